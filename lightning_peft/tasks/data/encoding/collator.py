"""``Collator`` pads the rows of one batch to one length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_peft.tasks.data.encoding.examples import Example

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
        tokenizer = self.tokenizer
        longest = max(len(row["input_ids"]) for row in examples)
        length = longest if self.length is None else max(self.length, longest)
        padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in examples]
        batch = {
            name: self._padded([row[name] for row in rows], padding.get(name, 0), length)
            for name in rows[0]
            if name != "labels"
        }
        if "labels" in examples[0]:
            batch["labels"] = self._labels([row["labels"] for row in examples], length)
        return batch

    def _labels(self, labels: list[Any], length: int) -> Tensor:
        return self._padded(labels, IGNORED, length)

    def _padded(self, rows: list[Any], value: int, length: int) -> Tensor:
        if not isinstance(rows[0], list):
            return torch.tensor(rows)
        padded = np.full((len(rows), length), value, dtype=np.int64)
        left = self.tokenizer.padding_side == "left"
        for place, row in zip(padded, rows, strict=True):
            place[length - len(row) if left else 0 :][: len(row)] = row
        return torch.from_numpy(padded)
