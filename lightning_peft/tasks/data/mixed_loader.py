"""``MixedLoader`` loads batches of several tasks and continues where a checkpoint stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_peft.tasks.data.encoding.examples import Example, Examples
from lightning_peft.tasks.data.task_sampling import Mixture

TASK_IDS = "task_ids"  # of a batch's entry


class TaskExamples(Dataset[Example]):
    """The examples of one task, each with its position.

    Args:
        examples: As the task encoded them.
        position: Of the task.
    """

    def __init__(self, examples: Examples, position: int) -> None:
        self.examples, self.position = examples, position

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return {**self.examples[index], TASK_IDS: self.position}


class MixedLoader:
    """Loads a mixture's batches pass by pass; its state is their number, up to which it draws again to continue.

    Args:
        rows: The rows of all tasks.
        mixture: Arguments of the `Mixture`.
        collate: Makes a batch.
        num_workers: Processes that do so.
        rank: Which of ``world`` processes this is; each takes one of so many batches.
        world: Number of processes.
        lengths: The length of each row, if rows of about the same length are to share a batch.
    """

    def __init__(
        self,
        rows: Dataset[Example],
        mixture: tuple[Any, Any, Any, Any],
        collate: Callable[[list[Example]], dict[str, Tensor]],
        num_workers: int = 0,
        rank: int = 0,
        world: int = 1,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.rows, self.mixture, self.collate, self.num_workers = rows, mixture, collate, num_workers
        self.rank, self.world, self.num_yielded, self.lengths = rank, world, 0, lengths
        self.stream = self._start()

    def __len__(self) -> int:
        return len(self.stream) // self.world

    def _start(self) -> Mixture:
        return Mixture(*self.mixture, self.lengths, self.world)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._fast_forward()
        batches = islice(self.stream, self.rank, len(self) * self.world, self.world)
        loader = DataLoader(
            self.rows,
            batch_sampler=cast(Sampler[list[int]], batches),
            num_workers=self.num_workers,
            collate_fn=self.collate,
            generator=torch.Generator(),  # so that the global one is left where it was
        )
        # No generator, which would take its place only when it is asked for a batch, together with drawing that batch.
        return map(self._count, loader)

    def _count(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.num_yielded += 1
        return batch

    def _fast_forward(self) -> None:
        """Move the stream to the first batch that was not yielded; worker processes have drawn ahead of it."""
        target = self.num_yielded * self.world
        if self.stream.position > target:
            self.stream = self._start()
        for _ in range(target - self.stream.position):
            next(self.stream)

    def state_dict(self) -> dict[str, Any]:
        """The number of batches that were yielded, and the settings that they depend on."""
        sizes, batch_size, sampling, seed = self.mixture
        settings = {"sizes": list(sizes), "batch_size": batch_size, "sampling": sampling, "world": self.world}
        settings["group_by_length"] = self.lengths is not None
        return {**settings, "seed": seed, "given": self.num_yielded}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue after these batches.

        Args:
            state_dict: As `state_dict` returned it.

        Raises:
            ValueError: If it is of other data or settings.
        """
        expected, seed = self.state_dict(), state_dict["seed"]
        differ = [name for name in expected if name not in ("seed", "given") and expected[name] != state_dict.get(name)]
        if differ:
            pairs = ", ".join(f"{name}={state_dict.get(name)!r}, here {expected[name]!r}" for name in differ)
            raise ValueError(f"The checkpoint was trained with other batches: {pairs}. Go on with the same data.")
        self.mixture, self.num_yielded = (*self.mixture[:3], seed), state_dict["given"]
        self.stream = self._start()
