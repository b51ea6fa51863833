"""What commands print."""

from __future__ import annotations

import sys


def echo(text: str) -> None:
    """Print a result now, also where the output goes to a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
