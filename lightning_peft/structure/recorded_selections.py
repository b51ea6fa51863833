"""``record_selections`` lists what ``select`` returns meanwhile, so that injection can compare it with what changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import nn


class Selection(NamedTuple):
    """Module with several parts that ``select`` or ``select_modules`` returned, and the targets that selected it.

    Args:
        name: Dotted name of the module.
        host: The module.
        targets: Globs and roles that were given.
    """

    name: str
    host: nn.Module
    targets: Sequence[str]


recorded_selections: ContextVar[list[Selection] | None] = ContextVar("recorded_selections", default=None)


@contextmanager
def record_selections() -> Iterator[list[Selection]]:
    """Context that lists selected modules with several parts: injection compares what adapters change in them."""
    selections: list[Selection] = []
    token = recorded_selections.set(selections)
    try:
        yield selections
    finally:
        recorded_selections.reset(token)
