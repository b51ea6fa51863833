"""``call_with_change``: how attention is changed in modules that reach it through transformers' interface alone.

A function mode would see each operation of such a module, most of them in vain. Instead, the change is kept for the
thread, and what the interface returns makes it: see ``interface_attention``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Change = Callable[..., Tensor]


class ThreadChange:
    """A change of attention calls that is under way in a thread.

    Args:
        change: Function of the attention function and its arguments; see ``AttentionCalls``.
        outer: The change around it, of another adapter or another module; None for the outermost.
    """

    __slots__ = ("change", "outer", "seen")

    def __init__(self, change: Change, outer: ThreadChange | None) -> None:
        self.change, self.outer, self.seen = change, outer, False


class _Thread(threading.local):
    """What is under way in each thread."""

    change: ThreadChange | None = None  # the innermost


thread = _Thread()


def call_with_change(
    change: Change, inner: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, bool]:
    """Return what a module returns with its attention changed, and whether it called attention."""
    outer = thread.change
    mine = thread.change = ThreadChange(change, outer)
    try:
        output = inner(*args, **kwargs)
    finally:
        thread.change = outer
    return output, mine.seen
