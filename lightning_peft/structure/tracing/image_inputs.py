"""``with_images``: adds images to the example inputs of a model that reads them among its tokens."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def with_images(model: nn.Module, config: Any, inputs: dict[str, Any], images: Tensor) -> dict[str, Any]:
    """Return inputs with one image, and as many tokens for it as the model computes vectors from the image.

    They are returned as they are if the model reads no images among its tokens, or cannot read any of the usual forms.

    Args:
        model: A model of transformers; its twin suffices.
        config: Its configuration.
        inputs: Inputs of text.
        images: Two images (2, channels, height, width).
    """
    entries = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    token = next((entry for entry in entries if entry is not None), None)
    features_of: Any = getattr(model, "get_image_features", None)
    names = inspect.signature(model.forward).parameters
    if token is None or features_of is None or "pixel_values" not in names:
        return inputs
    for pixels in _forms(config, images[:1], names):
        with suppress(Exception), torch.no_grad():  # which it raises for another form of images
            return _with_tokens(inputs, pixels, features_of(**pixels), token, names)
    return inputs


def _with_tokens(
    inputs: dict[str, Any], pixels: dict[str, Tensor], features: Any, token: int, names: Container[str]
) -> dict[str, Any]:
    """Return inputs with a token for each vector that the model computed from images."""
    vectors = tree_leaves(getattr(features, "pooler_output", features))
    count = sum(x.numel() // x.shape[-1] for x in vectors if isinstance(x, Tensor))
    text = inputs["input_ids"][:1]
    ids = torch.cat([text[:, :2], torch.full((1, count), token), text[:, 2:]], 1)
    types = {name: (ids == token).long() for name in ("mm_token_type_ids", "token_type_ids") if name in names}
    return {**inputs, **pixels, **types, "input_ids": ids}


def _forms(config: Any, image: Tensor, names: Any) -> Iterator[dict[str, Any]]:
    vision = getattr(config, "vision_config", config)
    if "image_grid_thw" in names:  # patches, one below the other
        merged = 2 * vision.spatial_merge_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        yield {"pixel_values": torch.randn(merged**2, patch), "image_grid_thw": torch.tensor([[1, merged, merged]])}
    yield {"pixel_values": image}
    yield {"pixel_values": image[:, None]}  # several images for each row
