"""``PEFTParser``: the parser of ``PEFTCLI``; its help begins with what is chosen most, its complaints are short."""

from __future__ import annotations

import sys
from argparse import SUPPRESS
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from .complaints import paragraph

TOOLS = ("merge", "export", "import", "plan", "targets")
_FIT_ONLY_KEYS = ("ckpt_path", "weights_only")
# Groups of the help in their order, by the beginning of their options, with what they are called.
_TITLES = {
    "": "options",
    "peft": "peft: the method, and what else trains",
    "model": "model: a task of lightning_peft, or your own LightningModule by class path",
    "data": "data: rows for it, or your own LightningDataModule by class path",
    "optimizer": "optimizer: one of torch's, in place of the module's own",
    "lr_scheduler": "lr_scheduler: one of torch's, for that optimizer",
    "trainer": "trainer: Lightning's Trainer",
}


class ClearParser(ArgumentParser):
    """A parser whose complaints are one paragraph, with the nearest names where one is not known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with a message."""
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        if not self.exit_on_error:
            super().error(message, ex)
        said = paragraph(message, parser)
        said += "" if said.endswith((".", "?", "!")) else "."
        sys.stderr.write(f"{program}: error: {said} See {program} --help.\n")
        self.exit(2)


class PEFTParser(ClearParser, LightningArgumentParser):
    """The parser of a command that builds a model: the method, the model and the data come before the Trainer."""

    subcommands: Any = None

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add subcommands, and keep what more can be added to."""
        self.subcommands = super().add_subcommands(*args, **kwargs)
        return self.subcommands

    def add_method_arguments(self, theclass: Any, themethod: str, *args: Any, **kwargs: Any) -> Any:
        """Add the arguments of a Trainer method; a tool also accepts the keys that ``fit`` alone has in its config."""
        added = super().add_method_arguments(theclass, themethod, *args, **kwargs)
        for key in _FIT_ONLY_KEYS if themethod in TOOLS else ():
            self.add_argument(f"--{key}", type=Any, help=SUPPRESS)
        return added

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help: groups in the order of their use, and a usage of one line."""
        if any(action.dest == "peft.method" for action in self._actions):
            order, groups = list(_TITLES), list[Any](self._action_groups)
            groups.sort(key=lambda group: order.index(_section(group)))
            self._action_groups[:] = groups  # type: ignore[index]
            for group in groups:
                group.title = _TITLES[section] if (section := _section(group)) else group.title
                if group.title == (self.description or "").rstrip("."):
                    group.title = f"options of {self._command()} alone"
            shown = "--config FILE [--peft.method NAME] [--model NAME] [--data NAME] [--OPTION VALUE ...]"
            self.usage = f"lightning-peft {self._command()} {shown}"
        return super().format_help(*args, **kwargs)

    def _command(self) -> str:
        return self.prog.rpartition(" ")[2]


def _section(group: Any) -> str:
    """Return the first part of the names of a group's options, if it is a section's, or nothing."""
    names = [option for action in group._group_actions for option in action.option_strings]
    first = names[0].lstrip("-").partition(".")[0] if names else ""
    return first if first in _TITLES else ""
