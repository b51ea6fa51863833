"""``limit_allocation``: settings in a damaged file must not ask for more memory than its tensors let expect."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_limit = ContextVar[int | None]("_limit", default=None)  # of values in one tensor


@contextmanager
def limit_allocation(stored: int) -> Iterator[None]:
    """Context in which ``parameter_like`` refuses tensors far larger than all those that a file holds.

    Args:
        stored: Number of values in the file. What training needs beyond them is allowed for generously.
    """
    token = _limit.set(64 * stored + 10_000_000)
    try:
        yield
    finally:
        _limit.reset(token)


def check_allocation(shape: Sequence[int]) -> None:
    """Raise a ``ValueError`` if a tensor of this shape is too large within ``limit_allocation``."""
    limit = _limit.get()
    if limit is not None and math.prod(shape) > limit:
        raise ValueError(
            f"The stored settings ask for a tensor of {math.prod(shape):,} values, which fits nothing that is stored "
            f"with them: the file is damaged, or of another model."
        )
