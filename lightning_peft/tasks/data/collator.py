"""``Collator`` pads the rows of one batch to one length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.tasks.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


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
