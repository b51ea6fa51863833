"""``COMMANDS``: commands of ``lightning-peft`` that need no Trainer, by name.

Each imports what it does when it is called: of all commands, a start of the program runs one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli

from ..core.console import echo
from .parser import ClearParser

Command = Callable[[list[str]], Any]


def inspect(arguments: list[str]) -> None:
    """Print the content of an adapter file, or the differences of two."""
    from ..analysis.inspect import compare_adapters, inspect_adapter
    from ..analysis.inspect.format_text import difference_text, report_text

    parser = ClearParser(
        prog="lightning-peft inspect", description="Show what an adapter holds, or in what it differs from another."
    )
    parser.add_argument("adapter", type=str, help="Folder of save_adapter or of HF PEFT, or a checkpoint of a run")
    parser.add_argument("other", type=str, nargs="?", help="Another one, to compare with")
    parser.add_argument("--json", action="store_true", help="Print JSON")
    options = parser.parse_args(arguments)
    if options.other is None:
        report = inspect_adapter(options.adapter)
        text = report_text(report)
    else:
        report = compare_adapters(options.adapter, options.other)
        text = difference_text(report)
    echo(json.dumps(report, indent=2, allow_nan=False) if options.json else text)


def plot(arguments: list[str]) -> None:
    """Draw runs or an adapter, and print which files were written."""
    from ..plots.save import adapter, curves, parameters

    parser = ClearParser(prog="lightning-peft plot", description="Draw runs, or what an adapter holds.")
    kinds, drawn = parser.add_subcommands(dest="picture"), {}
    for function, first, count, description in (
        (curves, "folders", "+", "Folders of runs with CSVLogger"),
        (parameters, "folders", "+", "Folders of runs of `lightning-peft fit`"),
        (adapter, "folder", None, "Folder that save_adapter wrote"),
    ):
        kind = ClearParser()
        kind.add_argument(first, type=str, nargs=count, help=description)
        kind.add_function_arguments(function, skip={first}, as_group=False)
        kinds.add_subcommand(function.__name__, kind, help=(function.__doc__ or "").partition("\n")[0])
        drawn[function.__name__] = function
    options = parser.parse_args(arguments)
    for path in drawn[options.picture](**options[options.picture].as_dict()):
        echo(str(path))


def features(arguments: list[str]) -> None:
    """Fit a classifier on features of a frozen model, which are computed once and kept on disk."""
    from ..recipes.features import features as function

    run_recipe(function, arguments)


def federated(arguments: list[str]) -> None:
    """Train one adapter over clients that keep their rows, in rounds that Flower simulates on this machine."""
    from ..recipes.federated import federated as function

    run_recipe(function, arguments)


def mpt(arguments: list[str]) -> None:
    """Train a prompt for each source task, one shared prompt by their example, and transfer it to target tasks."""
    from ..recipes.multitask_prompt_tuning import mpt as function

    run_recipe(function, arguments)


def run_recipe(function: Callable[..., Any], arguments: list[str]) -> None:
    """Call a recipe with its arguments from the command line or from ``--config``; prints a dict that it returns."""
    report = auto_cli(
        function,
        args=arguments,
        as_positional=False,
        prog=f"lightning-peft {function.__name__}",
        parser_class=ClearParser,
    )
    if isinstance(report, dict):
        echo(_lines(report))


def _lines(report: dict[str, Any], prefix: str = "") -> str:
    """Return a report as lines of names and values."""
    lines = []
    for name, value in report.items():
        nested = isinstance(value, dict)
        lines.append(_lines(value, f"{prefix}{name} ") if nested else f"{prefix + name:<24}{_short(value)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value}"


COMMANDS: dict[str, Command] = {
    "features": features,
    "federated": federated,
    "inspect": inspect,
    "mpt": mpt,
    "plot": plot,
}


def list_commands(subcommands: Any) -> None:
    """Add the commands to those that the help of the program lists."""
    for name, command in COMMANDS.items():
        subcommands.add_subcommand(name, ClearParser(), help=(command.__doc__ or "").partition("\n")[0])
