"""``Places``: which tokens of a batch have a label, by number, so that a device is waited for once a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Some of the places of a batch, in order.

    How many they are decides how many logits there are, and the host has to know it. Numbers of places tell it; each
    selection by a mask would wait for the device again, forward and backward.

    Args:
        numbers: Which of the places of all rows, one row after the other (places,).
        shape: Number of rows and of tokens in each.
    """

    numbers: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, mask: Tensor) -> Places:
        """Return the places where a mask (batch, tokens) is True; waits for its device."""
        return cls(mask.flatten().nonzero()[:, 0], tuple(mask.shape))

    def __len__(self) -> int:
        return len(self.numbers)

    def with_first(self) -> Places:
        """Return the first place of the batch alone where there is none, so that something has a gradient of zero."""
        return self if len(self) else Places(self.numbers.new_zeros(1), self.shape)

    def take(self, x: Tensor) -> Tensor:
        """Return (places, ...) of x (batch, tokens, ...); of its last tokens where it has more."""
        numbers, width, more = self.numbers.to(x.device), self.shape[1], x.shape[1] - self.shape[1]
        if more:
            numbers = numbers + (numbers // width + 1) * more
        return x.flatten(0, 1).index_select(0, numbers)

    def spread(self, values: Tensor) -> Tensor:
        """Return values (places,) as (batch, tokens), 0 elsewhere."""
        everywhere = values.new_zeros(self.shape).flatten()
        return everywhere.index_copy(0, self.numbers.to(values.device), values).view(self.shape)
