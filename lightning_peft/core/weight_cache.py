"""``WeightCache``: W' of a layer for inference on the CPU, dropped when the base's weight or a factor changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.torch_api import write_count

LIMIT = 2**30  # bytes that all layers together may keep


class WeightCache:
    """Cache of one layer's updated weight, for evaluation on the CPU, where comparing factors costs next to nothing."""

    total = 0  # bytes kept by all layers

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self._base: tuple[int, int] = (0, 0)
        self._factors: list[Tensor] = []

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()  # copies and files start with an empty cache

    def __del__(self) -> None:
        self.clear()

    def get(self, base: Tensor, factors: Sequence[Tensor]) -> Tensor | None:
        """Return the cached weight if it was computed from this base weight and these values of the factors.

        Values are compared because a write through ``.data`` does not change a tensor's version; of the base, which is
        frozen, address and version are compared.
        """
        if self.weight is None or self._base != (base.data_ptr(), write_count(base)):
            return None
        same = len(factors) == len(self._factors) and all(map(torch.equal, self._factors, factors))
        return self.weight if same else None

    def set(self, base: Tensor, factors: Sequence[Tensor], weight: Tensor) -> None:
        """Replace the cached weight, unless the caches of all layers would exceed ``LIMIT``."""
        self.clear()
        if WeightCache.total + weight.nbytes <= LIMIT and not base.is_inference():
            WeightCache.total += weight.nbytes
            self.weight, self._base = weight, (base.data_ptr(), write_count(base))
            self._factors = [factor.detach().clone() for factor in factors]

    def clear(self) -> None:
        """Drop the cached weight."""
        if self.weight is not None:
            WeightCache.total -= self.weight.nbytes
        self.weight, self._factors = None, []
