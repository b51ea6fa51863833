"""``read_arrays`` reads images as CIFAR is often kept: arrays in one .npz file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.tasks.data.images.image_tables import ImageTable, ordered, pil
from lightning_peft.tasks.data.reading.splits import Split
from lightning_peft.tasks.messages import quoted

if TYPE_CHECKING:
    from PIL.Image import Image

_ALIASES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",), "predict": ("test",)}


def read_arrays(name: str, split: Split, image: str, label: str) -> ImageTable:
    """The images of a .npz file: ``images`` and ``labels``, or ``x_train`` and ``y_train``, and the like.

    Args:
        name: The file. Images are 8-bit numbers of shape (N, height, width, 3), (N, 3, height, width), or, in grey,
            (N, height, width). An array ``classes`` may name the classes.
        split: Whose arrays to take where the file has those of several.
        image: Name of the images' array, before the usual ones.
        label: Name of the labels' array, before the usual ones.

    Raises:
        ValueError: It has no such arrays, or they are something else.
    """
    with np.load(Path(name).expanduser(), allow_pickle=False) as file:
        images = _array(name, file, [image, "images", *_of_split(split, "x_{}", "{}_images")], "image")
        named = [label, "labels", *_of_split(split, "y_{}", "{}_labels")]
        labels = None if split == "predict" else _array(name, file, named, "label").reshape(-1)
        classes = [str(value) for value in file["classes"]] if "classes" in file else None
    images = _channels_last(name, images)
    load = partial(_from_array, images)
    if labels is None:
        return ImageTable(name, load, range(len(images)))
    if len(labels) != len(images):
        raise ValueError(f"{name!r} has {len(images)} images and {len(labels)} labels. Give each image one.")
    names = [str(value) for value in labels] if classes is None else _named(name, labels, classes)
    return ImageTable(name, load, range(len(images)), names, classes or ordered(names))


def _named(name: str, labels: np.ndarray[Any, Any], classes: list[str]) -> list[str]:
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"{name!r} names {len(classes)} classes, so labels are to be whole numbers from 0 to {len(classes) - 1}, "
            f"but some are {quoted(np.unique(labels)[[0, -1]].tolist())}. Correct labels or classes."
        )
    return [classes[int(value)] for value in labels]


def _of_split(split: Split, *patterns: str) -> list[str]:
    return [pattern.format(alias) for pattern in patterns for alias in _ALIASES[split]]


def _array(name: str, file: Any, wanted: list[str], what: str) -> np.ndarray[Any, Any]:
    found = next((key for key in wanted if key in file), None)
    if found is None:
        raise ValueError(
            f"{name!r} has the arrays {quoted(file.files)}, expected one of {quoted(dict.fromkeys(wanted))}. Give its "
            f"name by {what}."
        )
    array: np.ndarray[Any, Any] = file[found]
    return array


def _channels_last(name: str, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shape = images.shape
    if images.dtype == np.uint8 and len(shape) == 3:
        return images
    if images.dtype == np.uint8 and len(shape) == 4 and 3 in (shape[1], shape[3]):
        return images if shape[3] == 3 else images.transpose(0, 2, 3, 1)
    raise ValueError(
        f"{name!r} has images of type {images.dtype} and shape {shape}, expected uint8 from 0 to 255 of shape (N, "
        "height, width, 3), (N, 3, height, width) or (N, height, width)."
    )


def _from_array(images: np.ndarray[Any, Any], position: int) -> Image:
    image: Image = pil().fromarray(np.ascontiguousarray(images[position])).convert("RGB")
    return image
