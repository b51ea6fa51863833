"""``TableDataModule``: base class of DataModules that make padded batches from tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_peft.tasks.data.splits import Split, Splits
from lightning_peft.tasks.data.tables import Table
from lightning_peft.tasks.pretrained import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]

IGNORED = -100

Padding = Literal["longest", "max_length"]

_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


@dataclass(frozen=True)
class Collator:
    """Pads the rows of one batch to one length, labels per token with -100.

    Args:
        tokenizer: Knows the padding token and side.
        length: Length of all rows; by default that of the longest in the batch.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int | None = None

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """The batch."""
        features = [{name: row[name] for name in row if name != "labels"} for row in examples]
        padding = "longest" if self.length is None else "max_length"
        padded = self.tokenizer.pad(features, padding=padding, max_length=self.length, return_tensors="pt")
        batch: dict[str, Tensor] = dict(padded)
        if "labels" in examples[0]:
            batch["labels"] = self._labels([row["labels"] for row in examples], batch["input_ids"].shape[1])
        return batch

    def _labels(self, labels: list[Any], length: int) -> Tensor:
        if isinstance(labels[0], int):
            return torch.tensor(labels)
        padding = [[IGNORED] * (length - len(row)) for row in labels]
        left = self.tokenizer.padding_side == "left"
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(labels, padding, strict=True)])


class PortableDataModule(LightningDataModule):
    """Data whose batches worker processes can make: the Trainer, with the model, does not go there with it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}


class TableDataModule(PortableDataModule, ABC):
    """Tokenises tables once and serves padded batches; a child says how a table becomes examples.

    Args:
        splits: The rows of each split.
        tokenizer: A reference as `lightning_peft.tasks.pretrained.locate` reads it.
        max_length: Longest row in tokens.
        batch_size: Rows per batch.
        num_workers: Processes that build batches.
        padding: To the longest row of each batch, or all rows to max_length, so that a row is the same in each batch.
    """

    padding_side: str | None = None

    def __init__(
        self,
        splits: Splits,
        tokenizer: str | None,
        max_length: int,
        batch_size: int,
        num_workers: int,
        padding: Padding = "longest",
    ) -> None:
        super().__init__()
        if padding not in get_args(Padding):
            raise ValueError(f"Got padding={padding!r}, expected one of {', '.join(get_args(Padding))}.")
        for name, count in {"max_length": max_length, "batch_size": batch_size}.items():
            if count < 1:
                raise ValueError(f"Got {name}={count}, expected 1 or more.")
        self.splits = splits
        self.reference = tokenizer  # None: that of the model that the Trainer trains
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.padding = padding
        self._examples: dict[Split, list[Example]] = {}

    @abstractmethod
    def encode(self, split: Split, table: Table) -> list[Example]:
        """Token ids, attention mask and labels of each row."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use."""
        trained = getattr(self.trainer, "lightning_module", None)
        reference = self.reference or getattr(trained, "hparams", {}).get("model")
        if reference is None:
            raise ValueError(
                "Got neither model nor tokenizer, and the module that is trained names no model either. Give the data "
                "the model whose tokenizer to use."
            )
        tokenizer = build_tokenizer(reference, self.padding_side)
        if self.max_length > tokenizer.model_max_length:
            raise ValueError(
                f"Got max_length={self.max_length}, but the model of {reference!r} takes at most "
                f"{tokenizer.model_max_length} tokens. Lower max_length."
            )
        return tokenizer

    def setup(self, stage: str) -> None:
        """Read and tokenise what the stage needs, unless the labels' meaning is still to come from a checkpoint."""
        for split in _SPLITS[stage]:
            optional = stage == "fit" and split == "validation" and not self.splits.has(split)
            if self.ready(split) and not optional:
                self.examples(split)

    def ready(self, split: Split) -> bool:
        """Whether a split can be encoded before a checkpoint is loaded."""
        return True

    def examples(self, split: Split) -> list[Example]:
        """The encoded rows of a split."""
        if split not in self._examples:
            self._examples[split] = self.encode(split, self.splits.rows(split))
        return self._examples[split]

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """The batch of some examples, by `Collator`; a child whose examples are of another form overrides it."""
        length = self.max_length if self.padding == "max_length" else None
        return Collator(self.tokenizer, length)(examples)

    def train_dataloader(self) -> DataLoader[Example]:
        """Shuffled batches of the train rows."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """Batches of the validation rows; an empty list without any."""
        return self._loader("validation") if self.splits.has("validation") else []

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
            collate_fn=self.collate,
        )
