"""``Splits`` says which rows of which file train, validate, test or are predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from lightning_peft.tasks.data.reading.read_table import read_table
from lightning_peft.tasks.data.reading.table_stream import TableStream
from lightning_peft.tasks.data.reading.tables import Table

Split = Literal["train", "validation", "test", "predict"]


class Splits:
    """The rows of each split, each file read once.

    Args:
        files: The file of each split, or what else `read_table` reads; None where there is none.
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
        self._tables: dict[tuple[str, Split], Table] = {}

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

    def check_streaming(self) -> None:
        """Refuse to hold out validation rows from a file that is read as it comes."""
        if self.files["train"] is not None and self.files["validation"] is None and self.validation_fraction:
            raise ValueError(
                f"Got streaming=True, validation_fraction={self.validation_fraction} and no validation file, but rows "
                "that are read as they come cannot be held out. Give a validation file, or set validation_fraction=0."
            )

    def stream(self) -> TableStream:
        """The train rows as they come, up to their limit."""
        return TableStream(self._name("train"), "train", self.limits.get("train"))

    def file(self, split: Split) -> Table:
        """The whole file of a split."""
        name = self._name(split)
        if (name, split) not in self._tables:
            self._tables[name, split] = read_table(name, split)
        return self._tables[name, split]

    def _name(self, split: Split) -> str:
        name = self.files[split]
        if name is None:
            raise ValueError(f"Got {split}=None, expected a file. Set {split} to the path of the {split} file.")
        return name

    def _part(self, split: Split) -> Table:
        table = self.file("train")
        count = round(len(table) * self.validation_fraction) or 1
        if count == len(table):
            raise ValueError(
                f"{table.source!r} has {count} rows, too few to hold out "
                f"validation_fraction={self.validation_fraction} of them. "
                "Give a validation file, or set validation_fraction=0 to train without validation."
            )
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
        indices: Any = (order[:count] if split == "validation" else order[count:]).sort().values.numpy()
        return table.take(indices)
