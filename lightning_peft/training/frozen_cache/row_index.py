"""``RowIndex``: which rows of the frozen trunk's outputs are in the file, and where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from .row_store import RowLayout, RowStore
from .use_tracing import OutputKey

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
ADVICE = "or set cache_frozen=False."


@dataclass(frozen=True)
class CallRecord:
    """One call of a part of the trunk.

    Args:
        name: Name of the part.
        inputs: ``input_signature`` of the call.
        spec: Structure of what it returned.
        leaves: The ``RowLayout`` of each tensor that it returned, and other values as they are.
    """

    name: str
    inputs: Any
    spec: TreeSpec
    leaves: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Rows that one step has added to the file.

    Args:
        calls: Calls of the trunk in that step.
        rows: Rows of that step.
        starts: Where the rows of each output begin in the file.
    """

    calls: tuple[CallRecord, ...]
    rows: int
    starts: dict[OutputKey, int]


RowEntry = tuple[RowBlock, int]  # the block of a row, and its position there


class RowIndex:
    """Finds rows in a ``RowStore`` by their keys.

    Args:
        folder: Where the file goes; by default the system's folder for temporary files.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.store = RowStore(folder)
        self.calls: tuple[CallRecord, ...] = ()  # of the first step; until then nothing is kept
        self.needed: frozenset[OutputKey] = frozenset()  # outputs that are used outside of the trunk
        self.entries: dict[bytes, RowEntry] = {}
        self._layouts: dict[tuple[CallRecord, ...], tuple[CallRecord, ...]] = {}

    def add(self, calls: Sequence[CallRecord], rows: int, starts: dict[OutputKey, int], keys: Iterable[bytes]) -> None:
        """Add rows that were written to the file."""
        shared = self._layouts.setdefault(tuple(calls), tuple(calls))  # one object for all steps with equal calls
        block = RowBlock(shared, rows, starts)
        self.entries.update((key, (block, position)) for position, key in enumerate(keys))

    def read(self, output: OutputKey, layout: RowLayout, entries: Sequence[RowEntry]) -> Tensor:
        """Return one output of the trunk for these rows; an output without rows is the same for all of them."""
        if not layout.by_row:
            return self.store.read(layout, [entries[0][0].starts[output]])
        return self.store.read(layout, [block.starts[output] + row * layout.row_bytes for block, row in entries])


def input_signature(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """Return what must be the same in each call, beside values and the number of rows."""
    return spec, tuple((tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else x for x in leaves)


def layout_of(name: str, leaf: Any, rows: int) -> Any:
    """Return the layout of a tensor that ``name`` returns, or another plain value as it is."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
        return RowLayout.of(leaf, rows)
    if isinstance(leaf, PLAIN):
        return leaf
    kind = f"tensor of layout {leaf.layout}" if isinstance(leaf, Tensor) else type(leaf).__name__
    raise ValueError(
        f"cache_frozen=True cannot take {name} apart by rows: it returns a {kind}, where tensors in tuples, lists, "
        f"dictionaries or a ModelOutput are expected. Change what it returns, {ADVICE}"
    )
