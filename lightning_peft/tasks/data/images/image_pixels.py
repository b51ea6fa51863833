"""From images to a batch of pixels: the preprocessing of a model, and random crops and flips."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import pad

from lightning_peft.tasks.data.images.image_tables import pil
from lightning_peft.tasks.pretrained import locate, transformers

if TYPE_CHECKING:
    from PIL.Image import Image


def build_processor(
    model: str | None, image_size: int | None, mean: list[float] | None, std: list[float] | None, trained_on: int | None
) -> Any:
    """The preprocessing of a model: that of its preprocessor_config.json, by Pillow and numpy on every machine.

    A model without that file, or with random weights, gets images that are scaled to its size, or left as they are
    where it has none, and normalized by a mean and a deviation of 0.5.

    Args:
        model: A reference as `locate` reads it; None for a model with random weights.
        image_size: Height and width, in place of the model's.
        mean: Of each channel, in place of the model's.
        std: Of each channel, in place of the model's.
        trained_on: Height and width in the model's config, if it says so.
    """
    pil()
    library = transformers()
    changes = {name: value for name, value in (("image_mean", mean), ("image_std", std)) if value is not None}
    if model is not None:
        load = partial(library.AutoImageProcessor.from_pretrained, locate(model), **_pillow())
        try:
            return load(**changes, **({} if image_size is None else _sizes(load(), image_size)))
        except OSError:
            rank_zero_info(f"{model!r} has no preprocessor_config.json: images are normalized by mean and std of 0.5.")
    size = image_size or trained_on
    kind = getattr(library, "ViTImageProcessorPil", None) or library.ViTImageProcessor
    return kind(do_resize=size is not None, size={"height": size or 1, "width": size or 1}, **changes)


def _pillow() -> dict[str, Any]:
    """Return how this version of transformers is asked for preprocessing by Pillow, whether torchvision is there."""
    return {"use_fast": False} if transformers().__version__.startswith("4.") else {"backend": "pil"}


def _sizes(processor: Any, size: int) -> dict[str, dict[str, int]]:
    """Return another size in the form in which a processor has its own."""
    square = {"height": size, "width": size}
    form = processor.size if isinstance(processor.size, dict) else vars(processor.size)
    scaled = {"shortest_edge": size} if form.get("shortest_edge") else square
    return {"size": scaled, "crop_size": square} if getattr(processor, "crop_size", None) else {"size": scaled}


def pixels(processor: Any, images: Sequence[Image]) -> Tensor:
    """A batch of images (rows, channels, height, width).

    Args:
        processor: As `build_processor` returns it.
        images: In colour.

    Raises:
        ValueError: They differ in size.
    """
    arrays = processor(list(images))["pixel_values"]
    shapes = sorted({array.shape[1:] for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"Images of a batch differ in size after preprocessing: {shapes[0]} and {shapes[-1]}. Set image_size to "
            "the height and width that all are to be scaled to."
        )
    return torch.from_numpy(np.stack(arrays))


def augment(images: Tensor, flip: bool, share: float) -> Tensor:
    """Flip each image with a probability of a half, and move it by up to a share of its side; zeros come in.

    Args:
        images: (rows, channels, height, width).
        flip: Whether to flip left and right.
        share: Of the shorter side.
    """
    rows, channels, height, width = images.shape
    if flip:  # drawn on the CPU, whose generator is the same on each machine
        chosen = (torch.rand(rows) < 0.5).to(images.device, non_blocking=True)
        images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
    margin = round(share * min(height, width))
    if not margin:
        return images
    top, left = torch.randint(2 * margin + 1, (2, rows)).to(images.device, non_blocking=True)
    y = top[:, None] + torch.arange(height, device=images.device)
    x = left[:, None] + torch.arange(width, device=images.device)
    row = torch.arange(rows, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return pad(images, [margin] * 4)[row, channel, y[:, None, :, None], x[:, None, None, :]]
