"""``WeightCache``: W' of a layer for inference on the CPU, dropped when the base's weight or a factor changes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.torch_api import write_count

LIMIT = 2**30  # bytes that all layers together may keep
_lock = threading.RLock()  # which the garbage collector may ask for again, to drop a cache, while it is held


class WeightCache:
    """Cache of one layer's updated weight, for evaluation on the CPU, where comparing factors costs next to nothing."""

    total = 0  # bytes kept by all layers

    def __init__(self) -> None:
        self._entry: _Entry | None = None  # replaced as a whole, since threads read it without a lock

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

        Values are compared because a write through ``.data`` does not change a tensor's version; of the base, which is
        frozen, address and version are compared. Other adapters of equal factors may scale them otherwise.
        """
        entry = self._entry
        if entry is None or entry.base != (base.data_ptr(), write_count(base)):
            return None
        if len(factors) != len(entry.factors) or entry.adapters != tuple(map(id, adapters)):
            return None
        return entry.weight if all(map(torch.equal, entry.factors, factors)) else None

    def set(self, base: Tensor, adapters: Sequence[object], factors: Sequence[Tensor], weight: Tensor) -> None:
        """Replace the cached weight, unless the caches of all layers would exceed ``LIMIT``."""
        key, ids = (base.data_ptr(), write_count(base)), tuple(map(id, adapters))
        new = None if base.is_inference() else _Entry(weight, key, ids, [f.detach().clone() for f in factors])
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
