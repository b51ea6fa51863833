"""``check_extendable``, ``is_continued`` and ``check_length``: what a call of a backbone must be like for a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...ops.value_checks import is_true, reading_is_free
from ...structure.cached_tokens import cached_tokens, caches, has_fixed_size
from ...structure.transformers_api import from_config

_PACKED = ("cu_seq_lens", "cu_seqlens", "max_length_q", "max_seqlen")  # arguments of flash attention for packed rows


def check_extendable(host: Any, call: Mapping[str, Any], length: int) -> None:
    """Raise where virtual tokens cannot be right in a call: fixed caches, masks of other shapes, packed rows."""
    mask = call.get("attention_mask")
    if fixed := [cache for cache in caches(call.values()) if has_fixed_size(cache)]:
        raise ValueError(
            f"{type(host).__name__} was given a {type(fixed[0]).__name__}, a cache of a fixed size, for which generate "
            f"makes no room for {length} virtual tokens, nor masks that have them: leave its cache_implementation "
            f"alone, or use PrefixTuning, which adds no tokens."
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        kind = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be (batch, tokens) where virtual tokens enter, got {kind}; generate "
            f"makes such a mask for a cache of a fixed size: leave its cache_implementation alone."
        )
    packed = next((name for name in call if name.startswith(_PACKED) and call[name] is not None), None)
    positions = call.get("position_ids")
    if packed is None and isinstance(positions, Tensor) and _restarts(positions, mask):
        packed = "position_ids that restart within a row"
    if packed is not None:
        raise ValueError(_packed(host, packed))


def _packed(host: Any, argument: str) -> str:
    return (
        f"{type(host).__name__} was given {argument}: several sequences in one row, of which virtual tokens would "
        f"reach the first alone. Give each sequence a row of its own, or use PrefixTuning or LoRA, which packed rows "
        f"suit."
    )


def _restarts(positions: Tensor, mask: Tensor | None) -> bool:
    """Return whether positions go back between two tokens that are no padding, on all axes where there are several."""
    if positions.shape[-1] < 2:
        return False
    back = positions[..., 1:] < positions[..., :-1]
    back = back.all(0) if back.dim() == 3 else back
    if mask is not None:
        text = mask[:, -positions.shape[-1] :].bool()
        back = back & text[:, 1:] & text[:, :-1]
    return not is_true(~back.any(), "position_ids restart within a row, where virtual tokens enter the first alone")


def is_continued(host: Any, call: Mapping[str, Any], length: int) -> bool:
    """Return whether a cache holds the tokens before those of a call; raise where it lacks the virtual ones."""
    cached = cached_tokens(host, call)
    if cached is None:  # a state that counts no tokens
        return True
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
    continued, count = bool(cached > 0), tokens.shape[1]
    if continued and mask is not None and cached != (expected := length + mask.shape[1] - count):
        raise ValueError(
            f"The cache given to {type(host).__name__} holds {cached} tokens, expected {expected}: {length} virtual "
            f"tokens and what attention_mask {tuple(mask.shape)} covers before the {count} tokens of this "
            f"call. Let generate build the cache itself, without an assistant model, or use use_cache=False."
        )
    if continued and mask is None and _counts_virtual(positions, cached):
        raise ValueError(
            f"position_ids begin at {cached}, the length of the cache given to {type(host).__name__} with its {length} "
            f"virtual tokens, which are none of the text: its tokens go on at {cached - length}."
        )
    if continued:
        _check_table(host, cached + count, length)
    return continued


def _counts_virtual(positions: Any, cached: Any) -> bool:
    if not isinstance(positions, Tensor) or not reading_is_free(positions):
        return False
    return bool((positions[..., 0] == cached).all())


def check_length(host: Any, tokens: int) -> None:
    """Raise where a text and the virtual tokens before it are longer than a model's configuration allows."""
    limit = from_config(host, "max_position_embeddings")
    if limit is not None and tokens > limit > 0:
        raise ValueError(
            f"{tokens} positions, virtual tokens included, are more than the model's {limit}; shorten the text."
        )


def _check_table(host: Any, tokens: int, length: int) -> None:
    """Raise where generated text goes beyond a table of positions; positions that are computed have no end."""
    limit = from_config(host, "max_position_embeddings")
    if limit is None or not tokens > limit > 0:
        return
    tables = [m for m in host.modules() if isinstance(m, nn.Embedding) and m is not host.get_input_embeddings()]
    if any(limit <= table.num_embeddings <= limit + 2 for table in tables):  # some begin at the third row
        raise ValueError(
            f"{type(host).__name__} has embeddings of {limit} positions, and this would be number {tokens}, {length} "
            f"virtual tokens included; generate up to max_length={limit - length}."
        )
