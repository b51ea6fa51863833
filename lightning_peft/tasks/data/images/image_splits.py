"""``ImageSplits`` says which images train, validate, test or are predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lightning_peft.tasks.data.images.image_arrays import read_arrays
from lightning_peft.tasks.data.images.image_tables import ImageTable, is_folder_of_images, of_dataset, read_folder
from lightning_peft.tasks.data.reading.splits import Split, Splits

Row = tuple[Any, int | None]  # an image and the number of its class


class ImageSplits(Splits):
    """The images of each split, as `Splits` with tables.

    Args:
        files: The folder, file or data set of each split; None where there is none.
        limits: How many images to keep of a split; None keeps all.
        validation_fraction: Share of the train images that is held out when there are no others to validate on.
        image: Column of the images, or name of their array.
        label: Column of the labels, or name of their array.
    """

    def __init__(
        self,
        files: Mapping[Split, str | None],
        limits: Mapping[Split, int | None],
        validation_fraction: float,
        image: str,
        label: str,
    ) -> None:
        super().__init__(files, limits, validation_fraction)
        self.image, self.label = image, label
        self._images: dict[Split, ImageTable] = {}

    def file(self, split: Split) -> Any:
        """All images of a split's folder, file or data set: an `ImageTable`."""
        if split not in self._images:
            self._images[split] = self._read(split, self.files[split])
        return self._images[split]

    def _read(self, split: Split, name: str | None) -> ImageTable:
        path = Path(name or "").expanduser()
        if name is not None and path.suffix == ".npz" and path.is_file():
            return read_arrays(name, split, self.image, self.label)
        if name is not None and is_folder_of_images(path):
            return read_folder(name, split)
        return of_dataset(super().file(split), split, self.image, self.label)


class ImageRows(Dataset[Row]):
    """Images of a table with the numbers of their classes.

    Args:
        table: The images.
        labels: Of each row; None where there are none.
    """

    def __init__(self, table: ImageTable, labels: list[int] | None) -> None:
        self.table, self.labels = table, labels

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        image = self.table.load(self.table.positions[index])
        return image, None if self.labels is None else self.labels[index]
