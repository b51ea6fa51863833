"""``change_sdpa_call``: a changed call of the function that transformers puts around torch's attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..transformers_api import SDPA_FUNCTION
from .thread_changes import Change, thread


def is_sdpa_call(function: Any, settings: Mapping[str, Any]) -> bool:
    """Return whether a call of the interface is one that ``change_sdpa_call`` knows the meaning of."""
    module = sys.modules.get("transformers.integrations.sdpa_attention")
    if module is None or function is not getattr(module, SDPA_FUNCTION, None) or settings.get("output_attentions"):
        return False
    return settings.get("position_bias") is None and settings.get("softcap") is None


def change_sdpa_call(
    change: Change,
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Return (output, None) of transformers' function around torch's attention after ``change``.

    Without a mask, more than one query means a causal call, unless the call or its module says otherwise; of a cache
    that has room for more, the first keys count. Grouped heads are not repeated before ``change``.
    """
    queries = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = queries > 1 and attention_mask is None and is_causal
    if causal and key.shape[2] > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
    # Where another change is under way or kernels differ by their masks, transformers' function chooses.
    by_torch = query.device.type == "cpu" and thread.change is None
    attend = _attend_by_torch if by_torch else partial(_attend_by_function, function, module, settings)
    output: Tensor = change(attend, query, key, value, attention_mask, dropout, causal, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _attend_by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
    )


def _attend_by_function(
    function: Callable[..., Any],
    module: nn.Module,
    settings: Mapping[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    known = {"dropout": dropout_p, "scaling": scale, "is_causal": is_causal}
    output: Tensor = function(module, query, key, value, attn_mask, **known, **settings)[0]
    return output.transpose(1, 2)
