"""``KeptRows``: views of two parameters as rows of heads, kept while the parameters have the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .torch_api import is_plain

Pair = tuple[Tensor, Tensor]


class KeptRows:
    """Views (batch, heads, length, size) of a pair of tensors (length, heads * size), kept for inference.

    A view sees whatever is written to its tensor, so that nothing needs to be compared but where the tensor's memory
    is, which is not used for anything else while the view lives. Copies and files start without views.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None  # replaced as a whole, since threads read it without a lock

    def __reduce__(self) -> tuple[type[KeptRows], tuple[()]]:
        return KeptRows, ()

    def get(self, tensors: Pair, joined: Pair, compute: Callable[[Tensor, Tensor], Tensor]) -> Pair:
        """Return rows of both tensors, by ``compute(tensor, x)`` where they are not known.

        Args:
            tensors: The tensors; views are kept only of those that live longer than this call.
            joined: Keys and values x (batch, heads, n, size) that the rows are made for.
            compute: Function that makes the rows.
        """
        (a, b), (x, y) = tensors, joined
        layout = (
            *(a.shape, a.stride(), x.shape[:2], x.shape[-1], x.dtype),
            *(b.shape, b.stride(), y.shape[:2], y.shape[-1], y.dtype),
        )
        kept = self._kept
        if kept is not None and kept.layout == layout and is_plain(a) and is_plain(b):
            rows = kept.rows
            if rows[0].data_ptr() == a.data_ptr() and rows[1].data_ptr() == b.data_ptr():
                return rows
        rows = compute(a, x), compute(b, y)
        views = all(
            is_plain(t) and is_plain(r) and r.data_ptr() == t.data_ptr() for t, r in zip(tensors, rows, strict=True)
        )
        self._kept = _Kept(layout, rows) if views else None
        return rows


class _Kept(NamedTuple):
    layout: tuple[Any, ...]
    rows: Pair
