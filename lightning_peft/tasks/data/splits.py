"""``Splits`` says which rows of which file train, validate, test or are predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from lightning_peft.tasks.data.read_table import read_table
from lightning_peft.tasks.data.tables import Table

Split = Literal["train", "validation", "test", "predict"]


class Splits:
    """The rows of each split, each file read once.

    Args:
        files: The file of each split; None where there is none.
        limits: How many rows to keep of a split; None keeps all.
        validation_fraction: Share of the train file that is held out when there is no validation file.
    """

    def __init__(
        self, files: Mapping[Split, str | None], limits: Mapping[Split, int | None], validation_fraction: float
    ) -> None:
        for split, limit in limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"Got limit_{split}={limit}, expected 1 or more, or null for all rows.")
        if not 0 <= validation_fraction < 1:
            raise ValueError(
                f"Got validation_fraction={validation_fraction}, expected 0 (none) to below 1, such as 0.1."
            )
        self.files = files
        self.limits = limits
        self.validation_fraction = validation_fraction
        self._tables: dict[str, Table] = {}

    def has(self, split: Split) -> bool:
        """Whether there are rows for it."""
        if split == "validation" and self.files["train"] is not None and self.validation_fraction > 0:
            return True
        return self.files[split] is not None

    def rows(self, split: Split) -> Table:
        """The rows of a split, up to its limit."""
        shared = self.files["validation"] is None and split in ("train", "validation") and self.has("validation")
        table = self._part(split) if shared else self.file(split)
        return table.take(range(len(table))[: self.limits.get(split)])

    def file(self, split: Split) -> Table:
        """The whole file of a split."""
        name = self.files[split]
        if name is None:
            raise ValueError(f"Got {split}=None, expected a file. Set {split} to the path of the {split} file.")
        if name not in self._tables:
            self._tables[name] = read_table(name)
        return self._tables[name]

    def _part(self, split: Split) -> Table:
        table = self.file("train")
        count = round(len(table) * self.validation_fraction) or 1
        if count == len(table):
            raise ValueError(
                f"{table.source!r} has {count} rows, too few to hold out "
                f"validation_fraction={self.validation_fraction} of them. "
                "Give a validation file, or set validation_fraction=0 to train without validation."
            )
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0)).tolist()
        return table.take(sorted(order[:count] if split == "validation" else order[count:]))
