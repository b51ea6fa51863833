"""``token_types``, ``plain_ids``: what arguments of transformers' models say about each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OF_TEXT = {"labels": -100, "global_attention_mask": 0, "cross_attention_mask": 0, "image_embeds_position_mask": 0}


def token_types(name: str, value: Tensor) -> Tensor | None:
    """Return what virtual tokens, as plain text, have in an argument about each token, (batch, 1, ...), or None."""
    if value.dim() > 1 and name.endswith("token_type_ids"):
        return value.amin(1, keepdim=True)
    return torch.full_like(value[:, :1], _OF_TEXT[name]) if name in _OF_TEXT else None


def plain_ids(config: Any, count: int) -> Tensor:
    """Return the ids below a number, and below 1,000, that stand for text."""
    special = special_ids(config)
    return torch.tensor([i for i in range(min(count, 1000)) if i not in special] or [0])


def special_ids(config: Any) -> set[int]:
    """Return the ids of a model that stand for padding, ends, images and the like, from its configuration."""
    configs = [config, getattr(config, "text_config", None)]
    named = [vars(config).items() for config in configs if config is not None]
    ends = ("_token_id", "_token_index")
    return {value for items in named for name, value in items if name.endswith(ends) and isinstance(value, int)}
