"""Tables of images: from a folder for each class, or from a data set of HF ``datasets``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.core.optional_imports import check_extra
from lightning_peft.tasks.data.class_labels import read_labels
from lightning_peft.tasks.data.reading.splits import Split
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.messages import did_you_mean, quoted

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class ImageTable:
    """Images with labels.

    Args:
        source: Where they come from, as errors name it.
        load: Returns the image at a position of the source.
        positions: Of each row, its position in the source.
        labels: The class name at each position; None where there are no labels.
        classes: The names of the classes, in their order.
    """

    source: str
    load: Callable[[int], Image]
    positions: Sequence[int]
    labels: Sequence[str] | None = None
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, indices: Sequence[int]) -> ImageTable:
        """Some of the rows."""
        return replace(self, positions=[self.positions[index] for index in indices])


def is_folder_of_images(path: Path) -> bool:
    """Whether a path is a folder with images, or with folders of them: not one that ``datasets`` has saved.

    Args:
        path: Of anything.
    """
    saved = ("dataset_dict.json", "dataset_info.json", "state.json")
    return path.is_dir() and not any((path / name).is_file() for name in saved)


def read_folder(name: str, split: Split) -> ImageTable:
    """The images of a folder: the name of a folder in it is the class of what is inside; to predict, of any depth.

    Args:
        name: The folder.
        split: ``predict`` asks for no labels.

    Raises:
        ValueError: It holds no images, or not as folders of classes.
    """
    root = Path(name).expanduser()
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if split == "predict":
        paths = _images(root.rglob("*"))
    else:
        paths = [path for folder in folders for path in _images(folder.iterdir())]
        empty = [folder.name for folder in folders if not _images(folder.iterdir())]
        if not folders or empty:
            inside = f"the folders {quoted(empty)} without images" if empty else "no folders"
            raise ValueError(
                f"{name!r} has {inside}, expected a folder for each class with its images "
                f"({', '.join(sorted(SUFFIXES))}). Where folders such as train and test stand above those of the "
                "classes, give each as its own split."
            )
    if not paths:
        raise ValueError(f"{name!r} holds no images ({', '.join(sorted(SUFFIXES))}).")
    labels = None if split == "predict" else [path.parent.name for path in paths]
    classes = [] if labels is None else [folder.name for folder in folders]
    return ImageTable(name, partial(_open, paths), range(len(paths)), labels, classes)


def of_dataset(table: Table, split: Split, image: str, label: str) -> ImageTable:
    """The images of a table.

    Args:
        table: As HF ``datasets`` reads it.
        split: ``predict`` asks for no labels.
        image: Column of the images.
        label: Column of the labels: a ClassLabel, strings or whole numbers.
    """
    for column in [image] if split == "predict" else [image, label]:
        if column not in table.columns:
            raise ValueError(
                f"{table.source!r} has no column {column!r}. Its columns: {quoted(table.columns)}."
                f"{did_you_mean(column, table.columns)} Give the name of one of them."
            )
    load = partial(_from_dataset, table.source, table.dataset, image)
    if split == "predict":
        return ImageTable(table.source, load, range(len(table)))
    names = getattr(table.dataset.features[label], "names", None)
    labels = read_labels(table, label)
    if names is None:
        return ImageTable(table.source, load, range(len(table)), labels, ordered(labels))
    table.refuse([i for i, text in enumerate(labels) if int(text) < 0], f"{table.source!r} has no label in {{rows}}.")
    return ImageTable(table.source, load, range(len(table)), [names[int(text)] for text in labels], names)


def ordered(labels: Sequence[str]) -> list[str]:
    """The different labels in order: by value if all are whole numbers.

    Args:
        labels: Of each row.
    """
    names = set(labels)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _images(paths: Any) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file())


def _open(paths: list[Path], position: int) -> Image:
    pillow = pil()
    try:
        with pillow.open(paths[position]) as image:
            return _upright(image)
    except OSError as error:
        raise ValueError(
            f"The image {str(paths[position])!r} cannot be read ({error}). Repair or remove it."
        ) from error


def _from_dataset(source: str, dataset: Any, column: str, position: int) -> Image:
    value = dataset[position][column]
    if hasattr(value, "convert"):
        return _upright(value)
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.ndim not in (2, 3):
        raise ValueError(f"Row {position + 1} of {source!r} has no image in column {column!r}.")
    image: Image = pil().fromarray(array.astype(np.uint8)).convert("RGB")
    return image


def _upright(image: Any) -> Image:
    """Return an image in colour, turned as its camera says."""
    pil()
    upright: Image = importlib.import_module("PIL.ImageOps").exif_transpose(image).convert("RGB")
    return upright


def pil() -> ModuleType:
    """The module ``PIL.Image``, imported on first use because it is an optional dependency.

    Raises:
        ImportError: If it is not installed.
    """
    check_extra("PIL", "Reading images needs Pillow", "vision")
    return importlib.import_module("PIL.Image")
