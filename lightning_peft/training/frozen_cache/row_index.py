"""What a trunk has returned, by row: in which form, where in the file, and for which keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from .row_store import Form, RowStore
from .use_tracing import Place

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
ADVICE = "or set cache_frozen=False."


@dataclass(frozen=True)
class CallRecord:
    """One call of a part of the trunk: what it was given, and the form of what it returned."""

    name: str
    given: Any
    spec: TreeSpec
    leaves: tuple[Any, ...]  # a Form for each tensor, other values as they are


@dataclass(frozen=True, eq=False)
class Block:
    """Rows that one step has added to the file."""

    calls: tuple[CallRecord, ...]
    rows: int  # of the step
    starts: dict[Place, int]


Entry = tuple[Block, int]  # the block of a row, and its position there


class KeptRows:
    """The rows in a file.

    Args:
        folder: Where the file goes; by default the system's folder for temporary files.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.store = RowStore(folder)
        self.calls: tuple[CallRecord, ...] = ()  # of the first step; until then nothing is kept
        self.needed: frozenset[Place] = frozenset()
        self.index: dict[bytes, Entry] = {}
        self._layouts: dict[tuple[CallRecord, ...], tuple[CallRecord, ...]] = {}

    def add(self, calls: Sequence[CallRecord], rows: int, starts: dict[Place, int], keys: Iterable[bytes]) -> None:
        """Make rows known that were written."""
        layout = self._layouts.setdefault(tuple(calls), tuple(calls))
        block = Block(layout, rows, starts)
        self.index.update((key, (block, position)) for position, key in enumerate(keys))

    def read(self, place: Place, form: Form, entries: Sequence[Entry]) -> Tensor:
        """Return one output of the trunk for these rows, which share it where it is one for all."""
        if not form.by_row:
            return self.store.read(form, [entries[0][0].starts[place]])
        return self.store.read(form, [block.starts[place] + row * form.row_bytes for block, row in entries])


def signature(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """Return what must be the same in each call, beside values."""
    return spec, tuple((tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else x for x in leaves)


def form_of(name: str, leaf: Any, rows: int) -> Any:
    """Return the form of a tensor that ``name`` returns, or another plain value as it is."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
        return Form.of(leaf, rows)
    if isinstance(leaf, PLAIN):
        return leaf
    what = f"tensor of layout {leaf.layout}" if isinstance(leaf, Tensor) else type(leaf).__name__
    raise ValueError(
        f"cache_frozen=True cannot take {name} apart by rows: it returns a {what}, where tensors in tuples, lists, "
        f"dictionaries or a ModelOutput are expected. Change what it returns, {ADVICE}"
    )
