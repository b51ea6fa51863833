"""``echo`` prints a result of a command."""

from __future__ import annotations

import sys


def echo(text: str) -> None:
    """Print a line and flush it, so that it appears at once where the output goes to a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
