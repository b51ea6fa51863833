"""``rows_of`` returns the rows of a LightningDataModule in the order of its datasets, without shuffling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from .digests import row_digest

LabelledSplit = Literal["train", "validation", "test"]
Label = int | str

_LOADERS = {"train": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader"}


@dataclass(frozen=True)
class Rows:
    """A map-style dataset, and how a batch is made of its items.

    Args:
        split: Name of the split, for errors.
        dataset: Items are dicts with a label, or tuples whose last part is the label.
        collate: Makes a batch from a list of items.
        label: Name of the label in a dict.

    Examples:
        >>> from torch.utils.data import default_collate
        >>> from lightning_peft.recipes.features import Rows
        >>> rows = Rows("train", [(torch.zeros(4), 0), (torch.ones(4), 1)], default_collate, "labels")
        >>> len(rows), rows.read(1)[2]  # the label
        (2, 1)
    """

    split: str
    dataset: Any
    collate: Callable[[list[Any]], Any]
    label: str

    def __len__(self) -> int:
        return len(self.dataset)

    def inputs(self, row: Any) -> Mapping[str, Any] | tuple[Any, ...]:
        """Return an item or a batch without its label."""
        if isinstance(row, Mapping):
            return {key: value for key, value in row.items() if key != self.label}
        return tuple(row[:-1])

    def item(self, number: int) -> Any:
        """Return an item, checked to have a label."""
        row = self.dataset[number]
        labelled = self.label in row if isinstance(row, Mapping) else isinstance(row, (tuple, list)) and len(row) > 1
        if labelled:
            return row
        has = f"{sorted(row)}" if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"Row {number} of {self.split} has no label {self.label!r}: it has {has}. Name its key by label, or let "
            "the dataset return (inputs, label)."
        )

    def read(self, number: int) -> tuple[bytes, int, Label]:
        """Return the digest of a row's inputs, its length in tokens (0 where it has none), and its label."""
        row = self.item(number)
        inputs = self.inputs(row)
        parts = inputs.values() if isinstance(inputs, Mapping) else inputs
        label = row[self.label] if isinstance(row, Mapping) else row[-1]
        return row_digest(inputs), max(map(_tokens, parts), default=0), self._plain(label, number)

    def _plain(self, label: Any, number: int) -> Label:
        single = isinstance(label, np.generic) or (isinstance(label, Tensor) and label.numel() == 1)
        label = label.item() if single else label
        if not isinstance(label, (int, str)):
            raise ValueError(
                f"Row {number} of {self.split} has the label {label!r}, expected a whole number or string."
            )
        return label


def rows_of(data: LightningDataModule, split: LabelledSplit, label: str) -> Rows:
    """Return the rows of a split of a data module that was set up.

    Raises:
        ValueError: There is no such split, or several loaders of it.
        TypeError: The dataset can only be iterated over, or makes batches itself.

    Examples:
        >>> from lightning_peft.recipes.features import rows_of
        >>> dataset = torch.utils.data.TensorDataset(torch.zeros(6, 4), torch.arange(6) % 2)
        >>> data = L.LightningDataModule.from_datasets(dataset)
        >>> len(rows_of(data, "train", label="labels"))
        6
    """
    name = _LOADERS[split]
    loader = getattr(data, name)() if is_overridden(name, data, LightningDataModule) else []
    if isinstance(loader, (list, tuple)):
        if len(loader) != 1:
            raise ValueError(
                f"{type(data).__name__}.{name} gives {len(loader)} loaders, expected one. Leave {split!r} out of "
                "splits, or let it return one DataLoader."
            )
        loader = loader[0]
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"The {split} data is {type(dataset if dataset is not None else loader).__name__}, which can only be "
            "iterated over. Rows are found again by their content: give a DataLoader of a dataset with __getitem__ "
            "and __len__."
        )
    if loader.batch_sampler is None:  # one that is given leaves batch_size at None, too
        raise TypeError(f"The {split} DataLoader has batch_size=None, so its dataset gives no single rows. Set one.")
    return Rows(split, dataset, loader.collate_fn, label)


def _tokens(part: Any) -> int:
    if isinstance(part, list):
        return len(part)
    return len(part) if isinstance(part, (Tensor, np.ndarray)) and part.ndim == 1 else 0
