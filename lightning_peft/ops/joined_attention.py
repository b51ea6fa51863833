"""``attend_joined``: attention to keys and values of which the first were added to the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_api import is_plain

Attend = Callable[..., Tensor]
MASK_LIMIT = 2**17  # numbers of a mask that costs less than empty queries, as measured on a CPU
_MASKS = 16
_masks: dict[tuple[int, int, int, torch.dtype], Tensor] = {}


def attend_joined(
    attend: Attend,
    length: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **settings: Any,
) -> Tensor:
    """Attend to keys and values whose first ``length`` were added to the call; every query sees these.

    Masks and a ``position_bias`` among the settings are those of the other keys; to the added ones they add nothing.
    A long causal call remains causal without a mask, so that it keeps its kernel: empty queries, as many as added keys,
    are put in front. Where the prefix is longer than the text, and in short calls on the CPU, a mask is cheaper.
    """
    queries, keys, empty = query.shape[-2], key.shape[-2], 0
    if is_causal and (mask := kept_causal_mask(query, keys, length)) is not None:
        attn_mask, is_causal = mask, False
    elif is_causal and length <= queries:
        query, empty = F.pad(query, (0, 0, length, 0)), length
    elif is_causal:
        attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(length)
        is_causal = False
    elif attn_mask is not None:
        attn_mask = lengthened_mask(attn_mask, length, keys - length)
    if settings.get("position_bias") is not None:
        settings["position_bias"] = lengthened_mask(settings["position_bias"], length, keys - length)
    output: Tensor = attend(query, key, value, attn_mask, dropout_p, is_causal, **settings)
    return output[..., empty:, :]


def kept_causal_mask(query: Tensor, keys: int, length: int) -> Tensor | None:
    """Return the additive mask of a causal call with ``length`` of its keys added, made once; None for long calls.

    All layers of a model have the same mask, so that none of them makes it and they save it once.
    """
    queries = query.shape[-2]
    if torch.compiler.is_dynamo_compiling() or query.device.type != "cpu" or queries * keys > MASK_LIMIT:
        return None
    if not is_plain(query):
        return None
    key = (queries, keys, length, query.dtype)
    mask = _masks.get(key)
    if mask is None:
        with torch.inference_mode(False):
            seen = torch.ones(queries, keys, dtype=torch.bool).tril(length)
            mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, float("-inf"))
        if is_plain(mask):
            if len(_masks) >= _MASKS:
                _masks.clear()
            _masks[key] = mask
    return mask


def lengthened_mask(mask: Any, length: int, keys: int) -> Any:
    """Return a mask for ``length`` more keys in front of ``keys`` others, which no query is kept from.

    Args:
        mask: Mask that broadcasts to (..., queries, keys), boolean or additive; a mask (batch, keys) of the kept keys,
            as flash attention has it; or a ``BlockMask`` of flex attention.
        length: Number of keys in front.
        keys: Number of the other keys; masks may be longer, as those of fixed caches were.
    """
    if not isinstance(mask, Tensor):
        return _lengthened_block_mask(mask, length, keys)
    if mask.shape[-1] != keys:
        mask = mask[..., :keys]
        mask = mask.expand(*mask.shape[:-1], keys)
    longer: Tensor = F.pad(mask, (length, 0), value=not mask.is_floating_point())
    return longer


def _lengthened_block_mask(mask: Any, length: int, keys: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, heads, queries, _ = mask.shape
    own = mask.mask_mod

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        others: Tensor = own(b, h, q, (k - length).clamp(min=0))
        return (k < length) | others

    device = mask.kv_num_blocks.device
    return create_block_mask(allowed, batch, heads, queries, length + keys, device=device, BLOCK_SIZE=mask.BLOCK_SIZE)
