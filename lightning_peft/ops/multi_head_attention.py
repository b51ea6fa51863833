"""``multi_head_attention``: ``F.multi_head_attention_forward`` with an attention function that can be replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the result of ``F.multi_head_attention_forward``, with ``attend`` for ``scaled_dot_product_attention``.

    ``attend`` takes (batch, heads, tokens, size) and an additive mask that broadcasts to (batch, heads, tokens, keys).
    Attention weights are those over the given tokens, before dropout, even if ``attend`` adds keys.

    Raises:
        TypeError: Static keys or values are given.
        ValueError: ``is_causal`` comes without the mask that it describes.
    """
    if static_k is not None or static_v is not None:
        raise TypeError("static_k and static_v are no projections of the input; this attention cannot be adapted.")
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True describes attn_mask, which is None; give the mask too.")
    separate = [weight for weight in (q_proj_weight, k_proj_weight, v_proj_weight) if weight is not None]
    packed = None if use_separate_proj_weight else in_proj_weight
    q, k, v = _projected((query, key, value), packed, separate, in_proj_bias)
    if query.dim() == 2:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    k, v = _lengthened(k, bias_k, add_zero_attn), _lengthened(v, bias_v, add_zero_attn)
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    causal = is_causal and key_padding_mask is None and not need_weights  # the mask is then the causal one alone
    mask = None if causal else _additive(attn_mask, key_padding_mask, num_heads, q.dtype, k.shape[2])
    y = attend(q, k, v, attn_mask=mask, dropout_p=dropout_p if training else 0.0, is_causal=causal)
    y = F.linear(y.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    weights = _weights(q, k, mask, average_attn_weights) if need_weights else None
    if query.dim() == 2:
        return y.squeeze(1), None if weights is None else weights.squeeze(0)
    return y, weights


def _projected(
    inputs: Sequence[Tensor], packed: Tensor | None, separate: Sequence[Tensor], bias: Tensor | None
) -> Sequence[Tensor]:
    """Return query, key and value, (tokens, batch, features) or without batch."""
    if packed is not None and inputs[0] is inputs[1] is inputs[2]:
        return F.linear(inputs[0], packed, bias).chunk(3, -1)
    weights = separate if packed is None else packed.chunk(3)
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [F.linear(x, weight, b) for x, weight, b in zip(inputs, weights, biases, strict=True)]


def _lengthened(x: Tensor, token: Tensor | None, zero: bool) -> Tensor:
    """Append a learned token and, if ``zero``, a token of zeros to keys or values (tokens, batch, features)."""
    if token is not None:
        x = torch.cat([x, token.expand(1, x.shape[1], -1)])
    return F.pad(x, (0, 0, 0, 0, 0, 1)) if zero else x


def _additive(mask: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype, keys: int) -> Tensor | None:
    """Return the sum of both masks as an additive mask (batch or 1, heads or 1, tokens or 1, keys).

    True in a boolean mask hides a key.
    """
    if mask is not None:
        mask = mask.view(-1, heads, *mask.shape[1:]) if mask.dim() == 3 else mask[None, None]
    if padding is not None:
        padding = padding.view(-1, 1, 1, padding.shape[-1])
    additive = [
        torch.zeros_like(m, dtype=dtype).masked_fill(m, float("-inf")) if m.dtype == torch.bool else m
        for m in (mask, padding)
        if m is not None
    ]
    if not additive:
        return None
    total = additive[0] if len(additive) == 1 else additive[0] + additive[1]
    return F.pad(total, (0, keys - total.shape[-1]))


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, average: bool) -> Tensor:
    """Return attention weights (batch, heads, tokens, keys), or their mean over heads."""
    scores: Tensor = query @ key.mT * query.shape[-1] ** -0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return weights.mean(1) if average else weights
