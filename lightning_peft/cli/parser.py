"""``PEFTParser``: the parser of ``PEFTCLI``; its complaints about a method name the methods and their fields."""

from __future__ import annotations

import dataclasses
from argparse import SUPPRESS
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from ..core.method import methods_by_name

TOOLS = ("merge", "export", "import", "plan", "targets")
_FIT_ONLY_KEYS = ("ckpt_path", "weights_only")


class PEFTParser(LightningArgumentParser):
    """A parser whose complaints about a method name the methods and their fields."""

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

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with a message."""
        if "method" in message:
            methods = methods_by_name()
            named = next((cls for name, cls in methods.items() if f"{name}'" in message or f"={name}" in message), None)
            message += f"\nMethods: {', '.join(methods)}."
            if named is not None:
                message += f"\nFields of {named.__name__}: {', '.join(f.name for f in dataclasses.fields(named))}."
        super().error(message, ex)
