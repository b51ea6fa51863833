"""``prepare`` reads a command line before it is parsed: configuration files, and what one method leaves another."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ALL_MESSAGES = "--all_messages"
_METHOD = re.compile(r"--peft\.method(\.class_path)?(=|$)")


def prepare(arguments: list[str]) -> list[str]:
    """Return the arguments to parse: where another method follows one of a file, without the settings of the first.

    Raises:
        FileNotFoundError: A configuration is no file; names near ones.
        ValueError: A configuration is no YAML; says where.
    """
    prepared, method = list[str](), None
    for option, value in _pairs(arguments):
        chosen = _method_of(option, value)
        if chosen is not None and method is not None and chosen != method:
            prepared += ["--peft.method", "null"]  # jsonargparse would keep what both call the same, such as targets
        method = chosen or method
        prepared += [option] if value is None or "=" in option else [option, value]
    return prepared


def import_from_working_directory() -> None:
    """Have modules of the working directory found, as ``python -m`` does; an installed package comes first."""
    if not sys.flags.safe_path and not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def _pairs(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each argument; those of a method or a configuration with their value."""
    rest = iter(arguments)
    for argument in rest:
        takes = argument in ("-c", "--config") or _METHOD.match(argument)
        if not takes and not argument.startswith("--config="):
            yield argument, None
        elif "=" in argument:
            yield argument, argument.partition("=")[2]
        else:
            yield argument, next(rest, None)


def _method_of(option: str, value: str | None) -> str | None:
    """Return the class of the method that an option, or the file that it names, chooses; None if it chooses none."""
    if value is None:
        return None
    if _METHOD.match(option):
        return None if value == "null" else _class_name(_parsed(value, option))
    settings = _read(value)
    peft = settings.get("peft") if isinstance(settings, dict) else None
    return _class_name(peft.get("method")) if isinstance(peft, dict) else None


def _class_name(method: Any) -> str | None:
    if isinstance(method, list):
        return repr([_class_name(one) for one in method])
    name = method.get("class_path") if isinstance(method, dict) else method
    return name.rpartition(".")[2] if isinstance(name, str) else None


def _read(value: str) -> Any:
    """Return what a configuration holds: a file, or YAML itself; None of an address, which its reader checks."""
    if "://" in value:
        return None
    path = Path(value)
    if path.is_file():
        return _parsed(path.read_text(encoding="utf-8"), str(path))
    if value.lstrip().startswith("{") or "\n" in value:
        return _parsed(value, "--config")
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".yaml", ".yml", ".json"))
        raise FileNotFoundError(f"The configuration {value} is a folder. Files in it: {', '.join(inside) or 'none'}.")
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = [str(path.parent / name) for name in difflib.get_close_matches(path.name, near, n=3, cutoff=0.6)]
    raise FileNotFoundError(
        f"The configuration {value} is no file." + (f" Nearest: {', '.join(close)}." if close else " Give a path.")
    )


def _parsed(text: str, source: str) -> Any:
    yaml = importlib.import_module("yaml")  # which jsonargparse brings
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        line = "" if mark is None else next(iter(text.splitlines()[mark.line : mark.line + 1]), "")
        advice = " YAML is indented by spaces, not by tabs." if "\t" in line else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"{source} is no YAML{place}: {problem}.{advice}") from None
