"""``WeightCache``: W' of a layer for inference on the CPU, dropped when the base's weight or a factor changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LIMIT = 2**30  # bytes that all layers together may keep


class WeightCache:
    """The updated weight of one layer, for evaluation on the CPU: there, comparing factors costs next to nothing."""

    total = 0  # bytes kept by all layers

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self._base: tuple[int, int] = (0, 0)
        self._factors: list[Tensor] = []

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()  # copies and files keep nothing

    def __del__(self) -> None:
        self.clear()

    def get(self, base: Tensor, factors: Sequence[Tensor]) -> Tensor | None:
        """Return the kept weight if this base weight and the values of these factors are those that it was made of.

        Values are compared because what is written through ``.data`` leaves no trace in a tensor's version; of the
        base, which is frozen, version and place must do.
        """
        if self.weight is None or self._base != (base.data_ptr(), base._version):
            return None
        same = len(factors) == len(self._factors) and all(map(torch.equal, self._factors, factors))
        return self.weight if same else None

    def set(self, base: Tensor, factors: Sequence[Tensor], weight: Tensor) -> None:
        """Keep an updated weight in place of what was kept, if there is room."""
        self.clear()
        if WeightCache.total + weight.nbytes <= LIMIT and not base.is_inference():
            WeightCache.total += weight.nbytes
            self.weight, self._base = weight, (base.data_ptr(), base._version)
            self._factors = [factor.detach().clone() for factor in factors]

    def clear(self) -> None:
        """Keep nothing any longer."""
        if self.weight is not None:
            WeightCache.total -= self.weight.nbytes
        self.weight, self._factors = None, []
