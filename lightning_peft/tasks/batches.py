"""From tables to padded batches: what the DataModules for text share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_peft.tasks.files import Table, read_table
from lightning_peft.tasks.models import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]
Split = Literal["train", "validation", "test", "predict"]

IGNORED = -100

_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


@dataclass(frozen=True)
class Collator:
    """Pads the rows of one batch to the longest of them, labels per token with -100.

    Args:
        tokenizer: Knows the padding token and side.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """The batch."""
        features = [{name: row[name] for name in row if name != "labels"} for row in examples]
        batch: dict[str, Tensor] = dict(self.tokenizer.pad(features, return_tensors="pt"))
        if "labels" in examples[0]:
            batch["labels"] = self._labels([row["labels"] for row in examples], batch["input_ids"].shape[1])
        return batch

    def _labels(self, labels: list[Any], length: int) -> Tensor:
        if isinstance(labels[0], int):
            return torch.tensor(labels)
        padding = [[IGNORED] * (length - len(row)) for row in labels]
        left = self.tokenizer.padding_side == "left"
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(labels, padding, strict=True)])


class TableDataModule(LightningDataModule, ABC):
    """Reads tables, tokenises them once, and serves padded batches; a child says how a table becomes examples.

    Args:
        files: The file of each split; None where there is none.
        limits: The number of rows to keep of a split; None keeps all.
        tokenizer: A reference as `lightning_peft.tasks.models.locate` reads it.
        max_length: Longest row in tokens.
        batch_size: Rows per batch.
        num_workers: Processes that build batches.
        validation_fraction: Share of the train file that is held out when there is no validation file.
    """

    padding_side: str | None = None

    def __init__(
        self,
        files: Mapping[Split, str | None],
        limits: Mapping[Split, int | None],
        tokenizer: str | None,
        max_length: int,
        batch_size: int,
        num_workers: int,
        validation_fraction: float,
    ) -> None:
        super().__init__()
        if tokenizer is None:
            raise ValueError(
                "Got neither model nor tokenizer, expected one of them. Give the model whose tokenizer to use."
            )
        counts = {"max_length": max_length, "batch_size": batch_size}
        counts |= {f"limit_{split}": limit for split, limit in limits.items() if limit is not None}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"Got {name}={count}, expected 1 or more.")
        if not 0 <= validation_fraction < 1:
            raise ValueError(
                f"Got validation_fraction={validation_fraction}, expected 0 (none) to below 1, such as 0.1."
            )
        self.files = files
        self.limits = limits
        self.reference = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.validation_fraction = validation_fraction
        self._tables: dict[str, Table] = {}
        self._examples: dict[Split, list[Example]] = {}

    @abstractmethod
    def encode(self, split: Split, table: Table) -> list[Example]:
        """Token ids, attention mask and labels of each row."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use."""
        tokenizer = build_tokenizer(self.reference, self.padding_side)
        if self.max_length > tokenizer.model_max_length:
            raise ValueError(
                f"Got max_length={self.max_length}, but the model of {self.reference!r} takes at most "
                f"{tokenizer.model_max_length} tokens. Lower max_length."
            )
        return tokenizer

    def setup(self, stage: str) -> None:
        """Read and tokenise what the stage needs, unless the labels' meaning is still to come from a checkpoint."""
        for split in _SPLITS[stage]:
            if self.ready(split) and (split != "validation" or self.has_validation or stage == "validate"):
                self.examples(split)

    def ready(self, split: Split) -> bool:
        """Whether a split can be encoded before a checkpoint is loaded."""
        return True

    @property
    def has_validation(self) -> bool:
        """Whether there are rows to validate on."""
        return self.files["validation"] is not None or self.validation_fraction > 0

    def examples(self, split: Split) -> list[Example]:
        """The encoded rows of a split."""
        if split not in self._examples:
            table = self.table(split)
            limit = self.limits.get(split)
            self._examples[split] = self.encode(split, table.take(range(len(table.rows))[:limit]))
        return self._examples[split]

    def table(self, split: Split) -> Table:
        """The rows of a split, before its limit."""
        if self.files["validation"] is not None or split not in ("train", "validation") or not self.has_validation:
            return self.file(split)
        table = self.file("train")
        count = round(len(table.rows) * self.validation_fraction) or 1
        if count == len(table.rows):
            raise ValueError(
                f"{str(table.path)!r} has {count} rows, too few to hold out "
                f"validation_fraction={self.validation_fraction} of them. "
                "Give a validation file, or set validation_fraction=0 to train without validation."
            )
        order = torch.randperm(len(table.rows), generator=torch.Generator().manual_seed(0)).tolist()
        return table.take(sorted(order[:count] if split == "validation" else order[count:]))

    def file(self, split: Split) -> Table:
        """The whole file of a split, read once."""
        name = self.files[split]
        if name is None:
            raise ValueError(f"Got {split}=None, expected a file. Set {split} to the path of the {split} file.")
        if name not in self._tables:
            self._tables[name] = read_table(name)
        return self._tables[name]

    def train_dataloader(self) -> DataLoader[Example]:
        """Shuffled batches of the train rows."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """Batches of the validation rows; an empty list without any."""
        return self._loader("validation") if self.has_validation else []

    def test_dataloader(self) -> DataLoader[Example]:
        """Batches of the test rows."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Example]:
        """Batches of the rows to predict, without labels."""
        return self._loader("predict")

    def _loader(self, split: Split) -> DataLoader[Example]:
        return DataLoader(
            cast(Dataset[Example], self.examples(split)),
            batch_size=self.batch_size,
            shuffle=split == "train",
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=Collator(self.tokenizer),
        )
