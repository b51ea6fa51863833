"""Numbers and factors of low-rank updates that several formats share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from .peft_format import StateDict


def limit_rank(state: StateDict, alpha: float, use_rslora: bool = False) -> tuple[StateDict, float]:
    """Return factors of a rank no higher than the weight's sides, and their alpha; a higher rank is multiplied out."""
    a, b = state.get("a"), state.get("b")
    if a is None or b is None or len(a) != b.shape[1] or len(a) <= min(len(b), a[0].numel()):
        return state, alpha
    product, limit = b @ a.flatten(1), min(len(b), a[0].numel())
    eye = torch.eye(limit, dtype=a.dtype)
    factors = {"a": product, "b": eye} if limit == len(b) else {"a": eye, "b": product}
    factors["a"] = factors["a"].view(-1, *a.shape[1:])
    scale = alpha / (math.sqrt(len(a)) if use_rslora else len(a))
    return state | factors, alpha_for_scale(scale, limit, use_rslora)


def most_common_value(values: Mapping[str, Any]) -> Any:
    """Return the value that most hosts have."""
    return Counter(values.values()).most_common(1)[0][0]


def alpha_for_scale(scale: float, rank: int, use_rslora: bool = False) -> float:
    """Return the alpha that gives this scale, a whole number if one does."""
    divisor = math.sqrt(rank) if use_rslora else rank
    alpha = scale * divisor
    return round(alpha) if round(alpha) / divisor == scale else alpha
