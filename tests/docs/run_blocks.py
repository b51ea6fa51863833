"""Runs blocks of a page: Python in one namespace, YAML and commands by the parser of ``lightning-peft``."""

import json
import re
import shlex
import sys
import types
from pathlib import Path
from unittest import mock

import yaml
from jsonargparse import ArgumentParser
from page_blocks import ROOT, Block

from lightning_peft.cli.main import main


class _ParsedError(Exception):
    """The arguments of a command were right; what follows is not wanted."""


class PageRun:
    """Runs the blocks of one page from top to bottom in the working directory.

    Args:
        page: Path of the page in the repository.
    """

    def __init__(self, page: str) -> None:
        name = "page_" + re.sub(r"\W", "_", page.removesuffix(".md"))
        self.module = types.ModuleType(name)
        sys.modules[name] = self.module  # dataclasses and jsonargparse look for a class where its module is
        self.commands = 0

    def close(self) -> None:
        """Forget the namespace."""
        del sys.modules[self.module.__name__]

    def run(self, block: Block) -> None:
        """Run one block."""
        getattr(self, f"run_{block.language}")(block)

    def run_python(self, block: Block) -> None:
        """Run Python; errors show the line of the page."""
        code = compile("\n" * block.line + block.text, str(ROOT / block.page), "exec")
        exec(code, self.module.__dict__)  # noqa: S102

    run_setup = run_python

    def run_json(self, block: Block) -> None:
        """Read a document, or one in each line."""
        try:
            json.loads(block.text)
        except json.JSONDecodeError:
            for line in filter(None, block.text.splitlines()):
                json.loads(line)

    def run_yaml(self, block: Block) -> None:
        """Parse a configuration, over the one that it changes if it is no whole one."""
        path = Path("block.yaml")
        path.write_text(block.text)
        over = block.over or (None if "model" in yaml.safe_load(block.text) else "configs/lora.yaml")
        command = re.match(r"# lightning-peft (\w+)", Path(over).read_text()) if over else None
        parse_command([command[1] if command else "fit", *(["--config", over] if over else []), "--config", str(path)])

    def run_bash(self, block: Block) -> None:
        """Parse the lines that begin with lightning-peft."""
        for arguments in commands_of(block.text):
            parse_command(arguments)
            self.commands += 1


def commands_of(text: str) -> list[list[str]]:
    """Return the arguments of each line that begins with ``lightning-peft``."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("lightning-peft ")]
    return [line[1:] for line in found]


def parse_command(arguments: list[str]) -> None:
    """Parse the arguments of ``lightning-peft`` and do no more.

    Raises:
        AssertionError: The parser refuses them, or they were not parsed.
    """
    real, nested = ArgumentParser.parse_args, False

    def parse_args(self, *args, **kwargs):
        nonlocal nested
        if nested:
            return real(self, *args, **kwargs)
        nested = True
        real(self, *args, **kwargs)
        raise _ParsedError

    with (
        mock.patch.object(ArgumentParser, "parse_args", parse_args),
        mock.patch.object(sys, "argv", ["lightning-peft"]),
    ):
        try:
            main(arguments)
        except _ParsedError:
            return
        except SystemExit as refusal:
            if refusal.code in (None, 0):  # of --help
                return
            raise AssertionError(f"lightning-peft {shlex.join(arguments)}: refused ({refusal.code})") from refusal
    raise AssertionError(f"lightning-peft {shlex.join(arguments)} was not parsed.")
