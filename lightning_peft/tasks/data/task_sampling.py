"""``Mixture`` samples batches from several tasks: an endless stream that a seed and a count of batches determine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Literal

import torch

from lightning_peft.core.method import check_setting
from lightning_peft.tasks.data.encoding.length_groups import WINDOW, group_by_length
from lightning_peft.tasks.data.reading.write_rows import in_parts

Sampling = Literal["proportional", "stochastic"]

MAX_ROWS_PER_TASK = 2**18  # rows of one task that are sampled, so that a huge task does not push the others out


class TaskRows:
    """The rows of one task in an order of its own, shuffled anew each time that all are taken.

    Args:
        size: Number of rows.
        first: Number of its first row among the rows of all tasks.
        seed: Decides the orders.
    """

    def __init__(self, size: int, first: int, seed: int) -> None:
        self.size, self.first = size, first
        self.generator = torch.Generator().manual_seed(seed)
        self.order, self.cursor = torch.empty(0, dtype=torch.long), 0

    def take(self, count: int) -> list[int]:
        """The next rows, by their numbers among the rows of all tasks."""
        taken: list[int] = []
        while len(taken) < count:
            if self.cursor == len(self.order):
                self.order, self.cursor = torch.randperm(self.size, generator=self.generator) + self.first, 0
            part = self.order[self.cursor : self.cursor + count - len(taken)].tolist()
            self.cursor += len(part)
            taken += part
        return taken


class Mixture:
    """Batches of row numbers in which tasks mix; rows are numbered through all tasks.

    ``proportional``: each pass takes n_k = min(size, 2^18) rows of task k, all shuffled together; with smaller tasks
    a pass is every row once, and rows of about the same length may share a batch. ``stochastic`` (multitask prompt
    tuning, https://arxiv.org/abs/2303.02861): for each batch n is drawn from 2 to K tasks, then n tasks with
    replacement and probability n_k / sum n, and each gives batch_size // n rows, the first drawn also the remainder.
    A pass is as many batches as a proportional one. Each task's rows come in an order of its own that wraps around.

    Args:
        sizes: Number of rows of each task.
        batch_size: Rows of a batch; with ``stochastic`` at least one for each task.
        sampling: How tasks share batches.
        seed: Decides every batch.
        lengths: The length of each row, if rows of about the same length are to share a proportional batch.
        world: How many batches in a row, one for each process, are then to be of about the same length.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        sampling: Sampling,
        seed: int,
        lengths: Sequence[int] | None = None,
        world: int = 1,
    ) -> None:
        kinds: dict[Sampling, Callable[[], Iterator[list[int]]]]
        kinds = {"proportional": self._proportional, "stochastic": self._stochastic}
        check_setting(sampling in kinds, "sampling", sampling, "'proportional' or 'stochastic'")
        check_setting(len(sizes) > 1, "tasks", len(sizes), "two tasks or more to mix")
        least = len(sizes) if sampling == "stochastic" else 1
        check_setting(batch_size >= least, "batch_size", batch_size, f"{least} or more for {len(sizes)} tasks")
        self.batch_size, self.counts = batch_size, [min(size, MAX_ROWS_PER_TASK) for size in sizes]
        self.generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (len(sizes),), generator=self.generator).tolist()
        firsts = [0, *accumulate(sizes)]
        self.rows = [TaskRows(*task) for task in zip(sizes, firsts, seeds, strict=False)]
        self.lengths, self.world = lengths, world
        self.position = 0  # of the next batch
        self._stream = kinds[sampling]()

    def __len__(self) -> int:
        """Number of batches in a pass."""
        return -(-sum(self.counts) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        self.position += 1
        return next(self._stream)

    def _proportional(self) -> Iterator[list[int]]:
        while True:
            rows = torch.tensor([i for task, n in zip(self.rows, self.counts, strict=True) for i in task.take(n)])
            order = torch.randperm(len(rows), generator=self.generator)
            for group in self._groups(rows[order].tolist()):
                yield from (group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size))

    def _groups(self, rows: list[int]) -> Iterator[list[int]]:
        """Yield rows of about the same length, enough for one batch of each process; else all rows as they are."""
        if self.lengths is None:
            yield rows
            return
        size = self.batch_size * self.world
        for window in in_parts(rows, WINDOW * size):
            for places in group_by_length([self.lengths[row] for row in window], size, self.generator):
                yield [window[place] for place in places]

    def _stochastic(self) -> Iterator[list[int]]:
        weights = torch.tensor(self.counts, dtype=torch.double)
        while True:
            n = int(torch.randint(2, len(self.rows) + 1, (), generator=self.generator))
            first, *others = torch.multinomial(weights, n, replacement=True, generator=self.generator).tolist()
            each, rest = divmod(self.batch_size, n)
            rows = self.rows[first].take(each + rest)
            yield rows + [i for task in others for i in self.rows[task].take(each)]
