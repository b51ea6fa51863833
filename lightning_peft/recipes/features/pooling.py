"""``pool`` reduces the vectors of a row's tokens to one vector."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["cls", "mean", "last"]


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling | None) -> Tensor:
    """Return the first attended token's vector, the mean over the attended tokens, or the last one's.

    Args:
        hidden: What a layer returned; (rows, features) is kept as it is.
        mask: 1 where a token counts, 0 where it is padding, at either side; None where all count.
        pooling: ``cls``, ``mean`` or ``last``; None where nothing is to pool.

    Shape:
        hidden (rows, tokens, features), mask (rows, tokens), result (rows, features)

    Raises:
        ValueError: The shapes do not fit each other or the pooling; says what to set.
    """
    shape = tuple(hidden.shape)
    if hidden.dim() == 2 and pooling is None:
        return hidden
    if hidden.dim() == 2:
        raise ValueError(f"The layer's output is {shape}, one vector per row already: set pooling to null.")
    if hidden.dim() != 3 or pooling is None:
        advice = "set pooling to cls, mean or last" if hidden.dim() == 3 else "give a layer after which they are pooled"
        raise ValueError(f"The layer's output is {shape}, not (rows, features): {advice}.")
    if mask is None:
        mask = torch.ones(shape[:2], dtype=torch.long)
    mask = mask.to(hidden.device)
    if mask.shape != shape[:2]:
        raise ValueError(
            f"The layer's output is {shape}, but the attention mask is {tuple(mask.shape)}: virtual tokens or a "
            "decoder change the length. Give a layer whose output has one vector for each token of the mask."
        )
    counts = mask != 0
    if pooling == "mean":
        wide = hidden.masked_fill(~counts[..., None], 0.0).float()
        return (wide.sum(1) / counts.sum(1, keepdim=True)).to(hidden.dtype)
    ends = counts.int() if pooling == "cls" else counts.int().flip(1)
    position = ends.argmax(1)  # of the first 1
    position = position if pooling == "cls" else shape[1] - 1 - position
    return hidden[torch.arange(len(hidden), device=hidden.device), position]
