"""``answer_likelihoods``: log p of the tokens of answers, with a chunk of their logits at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .chunks import token_losses, token_values
from .head_inputs import head_inputs
from .places import Places


def answer_likelihoods(
    model: nn.Module, inputs: Mapping[str, Any], places: Places, tokens: Tensor, needs_rest: bool
) -> Tensor:
    """Return log p of tokens, and log(1 - p) if it is needed, as ``Likelihoods`` takes them.

    Args:
        model: Model of transformers.
        inputs: Arguments of its call.
        places: Those that predict a token.
        tokens: These tokens, in order.
        needs_rest: Whether log(1 - p) is needed.
    """
    found = head_inputs(model, {"use_cache": False, **inputs}, places)
    if needs_rest:
        return token_values(token_likelihoods, found, tokens)
    return -token_values(token_losses, found, tokens)[:, None]


def token_likelihoods(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log p and log(1 - p) of each token (n, 2), of logits (n, vocabulary)."""
    return torch.stack([-cross_entropy(logits, tokens, reduction="none"), log_rest(logits, tokens)], 1)


def log_rest(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log(1 - p) as the logarithm of all other tokens' sum, so that nothing is lost where p rounds to 1."""
    others = logits.scatter(-1, tokens[:, None], -torch.inf)
    return others.logsumexp(-1) - logits.logsumexp(-1)
