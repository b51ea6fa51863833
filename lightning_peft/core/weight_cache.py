"""``WeightCache``: W' of a layer for inference on the CPU, dropped when the base's weight or a factor changes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.torch_api import write_count

LIMIT = 2**30  # bytes that all layers together may keep
_lock = threading.RLock()  # which the garbage collector may ask for again, to drop a cache, while it is held


class WeightCache:
    """Cache of one layer's updated weight, for evaluation on the CPU, where it costs little to notice changes.

    A write through ``.data`` or a view of numpy does not change a tensor's version. So the values of factors are
    compared and, of the base's weight, the product with a fixed vector, which reads it once, as one token does: what
    this does not notice is within the rounding of the layer's own products.
    """

    total = 0  # bytes kept by all layers

    def __init__(self) -> None:
        self._entry: _Entry | None = None  # replaced as a whole, since threads read it without a lock
        self.products_are_small = False  # whether adding the update to the output is known to cost little

    @property
    def weight(self) -> Tensor | None:
        """The cached weight."""
        return None if self._entry is None else self._entry.weight

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()  # copies and files start with an empty cache

    def __del__(self) -> None:
        self.clear()

    def get(self, base: Tensor, adapters: Sequence[object], factors: Sequence[Tensor]) -> Tensor | None:
        """Return the cached weight if it was computed from this base weight, these adapters, with these factors.

        Other adapters of equal factors may scale them otherwise.
        """
        entry = self._entry
        if entry is None or entry.base != (base.data_ptr(), write_count(base)):
            return None
        if len(factors) != len(entry.factors) or entry.adapters != tuple(map(id, adapters)):
            return None
        same = all(map(torch.equal, entry.factors, factors)) and torch.equal(entry.probed, _probe(base))
        return entry.weight if same else None

    def set(self, base: Tensor, adapters: Sequence[object], factors: Sequence[Tensor], weight: Tensor) -> None:
        """Replace the cached weight, unless the caches of all layers would exceed ``LIMIT``."""
        key, ids = (base.data_ptr(), write_count(base)), tuple(map(id, adapters))
        copies = [factor.detach().clone() for factor in factors]
        new = None if base.is_inference() else _Entry(weight, key, ids, copies, _probe(base))
        with _lock:
            self._replace(new if new is not None and WeightCache.total + weight.nbytes <= LIMIT else None)

    def clear(self) -> None:
        """Drop the cached weight."""
        with _lock:
            self._replace(None)

    def _replace(self, entry: _Entry | None) -> None:
        before, self._entry = self._entry, entry
        for each, sign in ((before, -1), (entry, 1)):
            WeightCache.total += 0 if each is None else sign * each.weight.nbytes


class _Entry(NamedTuple):
    weight: Tensor
    base: tuple[int, int]
    adapters: tuple[int, ...]
    factors: list[Tensor]
    probed: Tensor


def _probe(weight: Tensor) -> Tensor:
    """Return the product of a matrix with a vector of different numbers."""
    return weight.mv(_numbers(weight.shape[1], weight.dtype))


@functools.lru_cache(maxsize=32)
def _numbers(count: int, dtype: torch.dtype) -> Tensor:
    """Return numbers from 1 to 2, no two of which are equal or near a common multiple."""
    return 1 + (torch.arange(count, dtype=torch.float64) * 0.6180339887498949).frac().to(dtype)
