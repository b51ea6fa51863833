"""``lightning-peft``: ``Program`` is ``PEFTCLI`` with all commands, ``main`` runs one and says what is wrong."""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from .arguments import ALL_MESSAGES, import_from_working_directory, prepare
from .commands import COMMANDS, list_commands
from .leftovers import remove_empty_run
from .peft_cli import PEFTCLI
from .quiet import hide_known_messages
from .refusals import find_refusal

__all__ = ["COMMANDS", "PEFTCLI", "Program", "main"]

_DESCRIPTION = (
    "Fine-tune with LoRA and other adapters in Lightning: lightning-peft fit --config configs/lora.yaml. "
    "What a command takes: lightning-peft COMMAND --help."
)


class Program(PEFTCLI):
    """What ``main`` runs: ``PEFTCLI`` whose help also lists the commands that need no Trainer."""

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Add the commands to the help."""
        super().setup_parser(*args, **kwargs)
        parser: Any = self.parser
        parser.description = _DESCRIPTION
        parser.add_argument("--version", action="version", version=f"lightning-peft {version('lightning-peft')}")
        list_commands(parser.subcommands)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Refuse a command behind options, where ``main`` does not look for it."""
        if isinstance(args, list):
            self.config = parser.parse_args(args)
        else:
            super().parse_arguments(parser, args)
        if (name := self.config.get("subcommand")) in COMMANDS:
            parser.error(f"{name} has to be the first argument: lightning-peft {name} ...")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Leave Lightning's summary, which counts what PEFTStrategy counts, to those who ask for it."""
        settings = self.config[self.subcommand]["trainer"]
        if settings["enable_model_summary"] is None and self._get(self.config, "peft.show_summary"):
            self.config_init[self.subcommand]["trainer"]["enable_model_summary"] = False
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        with remove_empty_run(self.trainer):
            super()._run_subcommand(subcommand)


def main(args: ArgsType = None) -> None:
    """Run ``lightning-peft``."""
    import_from_working_directory()
    arguments = sys.argv[1:] if args is None else args
    try:
        if isinstance(arguments, list):
            _run(arguments)
        else:
            Program(args=args)
    except Exception as error:
        refusal = find_refusal(error)
        if refusal is None:
            raise
        said = " ".join(str(refusal).split())
        raise SystemExit(f"lightning-peft: {type(refusal).__name__}: {said}") from None


def _run(arguments: list[str]) -> None:
    """Run the command of a command line; without one, show the help, as a mistake."""
    if not arguments:
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
            Program(args=["--help"])
        raise SystemExit(2)
    if ALL_MESSAGES not in arguments:
        hide_known_messages()
    arguments = prepare(arguments)
    if arguments[0] in COMMANDS:
        COMMANDS[arguments[0]]([argument for argument in arguments[1:] if argument != ALL_MESSAGES])
    else:
        Program(args=arguments)
