"""``Rows``: the rows of a layer's weight that compute one part of its output, such as the keys of a fused layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """Rows start to stop of a layer's weight, seen as (out, in, *kernel); where heads interleave, of each period.

    In GPT-NeoX, whose layer has the query, key and value of one head below those of another, the keys of 4 heads of
    size 8 are ``Rows("key", 8, 16, period=24, repeats=4)``: rows 8 to 16, 32 to 40, 56 to 64 and 80 to 88 of 96.

    Attributes:
        part: ``query``, ``key`` or ``value``; empty for a whole layer.
        start: The first row.
        stop: The row after the last one.
        period: Rows from one repetition to the next; ``repeats`` periods make up the layer.
        repeats: Number of repetitions.

    Examples:
        >>> from lightning_peft.core import Rows
        >>> keys = Rows("key", 8, 16, period=24, repeats=4)
        >>> keys.size, keys.ranges(), keys.take(torch.zeros(96, 32)).shape
        (32, [(8, 16), (32, 40), (56, 64), (80, 88)], torch.Size([32, 32]))
    """

    part: str
    start: int
    stop: int
    period: int = 0
    repeats: int = 1

    @property
    def size(self) -> int:
        """The number of rows."""
        return (self.stop - self.start) * self.repeats

    @property
    def ends(self) -> tuple[int, int]:
        """The first row and the one after the last, of rows without repetitions."""
        return self.start, self.stop

    def ranges(self) -> list[tuple[int, int]]:
        """Return (first, after the last) of each repetition."""
        return [(self.start + i * self.period, self.stop + i * self.period) for i in range(self.repeats)]

    def numbers(self) -> Iterator[int]:
        """Yield the number of each row."""
        for first_and_end in self.ranges():
            yield from range(*first_and_end)

    def take(self, weight: Tensor) -> Tensor:
        """Return these rows of a tensor of shape (out, ...), a view where they do not repeat."""
        if self.repeats == 1:
            return weight[self.start : self.stop]
        return torch.unflatten(weight, 0, (self.repeats, self.period))[:, self.start : self.stop].flatten(0, 1)

    def features(self, x: Tensor) -> Tensor:
        """Return what these rows computed of an output (..., out), a view where they do not repeat."""
        if self.repeats == 1:
            return x[..., self.start : self.stop]
        return torch.unflatten(x, -1, (self.repeats, self.period))[..., self.start : self.stop].flatten(-2)

    def split(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, values) of each repetition, from values of shape (rows, ...)."""
        yield from zip((start for start, _ in self.ranges()), torch.split(rows, self.stop - self.start), strict=True)

    def put(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Return a tensor of shape (out, ...) with these rows replaced by others."""
        if self.repeats == 1:
            return torch.cat([weight[: self.start], rows, weight[self.stop :]])
        whole = torch.unflatten(weight, 0, (self.repeats, self.period))
        new = torch.unflatten(rows, 0, (self.repeats, -1))
        return torch.cat([whole[:, : self.start], new, whole[:, self.stop :]], 1).flatten(0, 1)

    def pad(self, values: Tensor, out: int, fill: float = 0.0) -> Tensor:
        """Return values (..., rows) at their places among ``out`` features; the others are ``fill``."""
        if self.repeats == 1:
            outside = self.start, out - self.stop
            return F.pad(values, outside, value=fill) if any(outside) else values
        outside = self.start, self.period - self.stop
        return F.pad(torch.unflatten(values, -1, (self.repeats, -1)), outside, value=fill).flatten(-2)

    def __str__(self) -> str:
        shown = ", ".join(f"{start}:{stop}" for start, stop in self.ranges()[:2])
        return f"{self.part} {shown}{', ...' if self.repeats > 2 else ''}".strip()


def periodic_rows(part: str, ranges: Sequence[tuple[int, int]], out: int) -> Rows | None:
    """Return rows that lie in these ranges of ``out``; None where they do not repeat evenly over all of them."""
    (start, stop), repeats = ranges[0], len(ranges)
    rows = Rows(part, start, stop) if repeats == 1 else Rows(part, start, stop, ranges[1][0] - start, repeats)
    complete = repeats == 1 or (rows.period * repeats == out and stop <= rows.period)
    return rows if complete and rows.ranges() == list(ranges) else None
