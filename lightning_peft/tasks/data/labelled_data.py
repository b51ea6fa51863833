"""``LabelledDataModule``: base class of data whose labels are the classes of its train file."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning_peft.tasks.data.class_labels import Classes
from lightning_peft.tasks.data.reading.splits import Split
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.data.table_data import TableDataModule
from lightning_peft.tasks.messages import quoted


class LabelledDataModule(TableDataModule):
    """Knows the classes of its train file before it encodes rows; checkpoints keep them."""

    classes: Classes | None = None

    @abstractmethod
    def train_classes(self, table: Table) -> Classes | None:
        """The classes of the train file, in order; None where labels are no classes."""

    def ready(self, split: Split) -> bool:
        """Labels can be encoded once the classes are known, or can be read from the train file."""
        return split in ("train", "predict") or self.classes is not None or self.splits.has("train")

    def learn(self, split: Split) -> None:
        """Read the classes from the train file, unless they are known and other rows are encoded."""
        if split == "train" or (split != "predict" and self.classes is None):
            train = self.splits.file("train")
            self._agree(self.train_classes(train), f"the train file {train.source!r}")

    def _agree(self, classes: Classes | None, source: str) -> None:
        if self.classes not in (None, classes):
            raise ValueError(
                f"{source} has the classes {quoted(classes or ())}, but {quoted(self.classes or ())} are in use "
                "already. A trained classifier keeps its classes: use the train file and the checkpoint that belong "
                "together."
            )
        self.classes = classes

    def state_dict(self) -> dict[str, Any]:
        """The classes."""
        return {"classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the classes of a checkpoint.

        Args:
            state_dict: As `state_dict` returned it.

        Raises:
            ValueError: If the train file has others.
        """
        if state_dict["classes"] is not None:
            self._agree(state_dict["classes"], "The checkpoint")
