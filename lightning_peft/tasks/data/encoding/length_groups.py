"""``LengthGroupedBatchSampler`` puts rows of about the same length into one batch, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, Sampler

WINDOW = 64  # batches that are sorted together


class LengthGroupedBatchSampler(BatchSampler):
    """Batches of rows of about the same length, in random order.

    The sampler's rows are taken 64 batches at a time: these are sorted by length, cut into batches, and their batches
    shuffled. So each epoch has other batches, and a batch is nearly as random as without. Of several processes, each
    with a `DistributedSampler` over the same epoch, all have batches of about the same length at each step: none waits.

    Args:
        sampler: Yields the indices of an epoch.
        batch_size: Rows per batch.
        drop_last: Whether to drop a last batch that has fewer rows.
        lengths: The length of each row.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, lengths: Sequence[int]) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.lengths = lengths

    def __iter__(self) -> Iterator[list[int]]:
        generator = self._generator()
        indices = iter(self.sampler)
        while window := list(islice(indices, WINDOW * self.batch_size)):
            lengths = [self.lengths[index] for index in window]
            *batches, rest = group_by_length(lengths, self.batch_size, generator)
            yield from ([window[place] for place in batch] for batch in batches)
            if rest and not self.drop_last:  # rows of any length, as random as the sampler's
                yield [window[place] for place in rest]

    def _generator(self) -> torch.Generator:
        """Return the generator of the batches' order: the same in all processes of an epoch."""
        sampler: Any = self.sampler
        epoch = getattr(sampler, "epoch", None)
        seed = int(torch.empty((), dtype=torch.int64).random_()) if epoch is None else sampler.seed + epoch
        return torch.Generator().manual_seed(seed)


def group_by_length(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Places of rows, in batches of about the same length and in random order, and what is left over at the end.

    Args:
        lengths: The length of each row.
        batch_size: Rows per batch.
        generator: Draws the order of batches.

    Returns:
        Whole batches, and then one list of fewer places, which may be empty.
    """
    full = len(lengths) // batch_size * batch_size
    ordered = sorted(range(full), key=lengths.__getitem__)
    starts = (torch.randperm(full // batch_size, generator=generator) * batch_size).tolist()
    return [*(ordered[start : start + batch_size] for start in starts), list(range(full, len(lengths)))]
