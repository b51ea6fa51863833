"""``Insertion`` and ``prepend_to_...``: virtual tokens enter a module's call and are removed from its output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.adapter import Call
from ...structure.transformers_api import POSITIONS, cached_tokens, from_config
from .strip_outputs import strip_virtual_tokens


class Insertion:
    """Insertion of virtual tokens before the first token of each row that is not padding.

    Args:
        length: Number p of virtual tokens.
        mask: Padding mask of shape (batch, n), zero or False at padding; without one the rows have no padding.
    """

    def __init__(self, length: int, mask: Tensor | None) -> None:
        self.length, self.index = length, None
        lead = None if mask is None else _lead(mask)
        if mask is not None and lead is not None:
            position = torch.arange(mask.shape[-1] + length, device=mask.device).expand(len(mask), -1)
            after_lead = torch.where(position < lead + length, position - lead, position)
            self.index = torch.where(position < lead, position + length, after_lead)  # into [virtual tokens; tokens]
            position = position[:, : mask.shape[-1]]
            self.kept = torch.where(position < lead, position, position + length)

    def insert(self, virtual: Tensor, tokens: Tensor) -> Tensor:
        """Insert (batch, p, ...) into (batch, n, ...); returns (batch, p + n, ...)."""
        joined = torch.cat([virtual, tokens], 1)
        return joined if self.index is None else _take(joined, self.index)

    def remove(self, x: Tensor) -> Tensor:
        """Remove the virtual tokens from (batch, p + n, ...); returns (batch, n, ...)."""
        # Contiguous, since the matrix product of a head would otherwise be computed row by row.
        return x[:, self.length :].contiguous() if self.index is None else _take(x, self.kept)

    def mask(self, mask: Tensor) -> Tensor:
        """Extend a mask by visible virtual tokens."""
        return self.insert(mask.new_ones(len(mask), self.length), mask)

    def positions(self, positions: Tensor) -> Tensor:
        """Return positions in which virtual tokens have the first p, and the positions of tokens are p larger."""
        if self.index is not None:
            positions = positions.expand(len(self.index), -1)
            first = positions.gather(1, self.index.argmin(1, keepdim=True).clamp(max=positions.shape[1] - 1))
        else:
            first = positions[:, :1]
        moved = torch.where(positions >= first, positions + self.length, positions)
        return self.insert(first + torch.arange(self.length, device=positions.device), moved)


def prepend_to_backbone(host: Any, inner: Call, call: Mapping[str, Any], prompt: Tensor, keep: bool = False) -> Any:
    """Call a backbone with virtual tokens inserted; its output has the positions of its input.

    In calls with a cache, which holds the virtual tokens already, only masks and positions are changed.

    Args:
        host: Module that takes ``input_ids`` or ``inputs_embeds``, and ``attention_mask``.
        inner: Call of the host without the adapter.
        call: Arguments by name.
        prompt: Virtual tokens (p, features), or (batch, p, features) with a separate prompt for each row.
        keep: Whether the output keeps the virtual tokens, as that of an encoder does for cross-attention.
    """
    call = dict(call)
    length, mask = prompt.shape[-2], call.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be (batch, tokens) where virtual tokens enter, got {tuple(mask.shape)}; generate "
            f"makes such a mask for a cache of a fixed size: leave its cache_implementation alone."
        )
    where = Insertion(length, mask)
    cached = cached_tokens(host, call)
    if cached > 0:
        _check_cache(host, call, cached, length)
    if mask is not None:
        call["attention_mask"] = where.mask(mask)
    if cached > 0:
        for name in POSITIONS:
            if call.get(name) is not None:
                call[name] = call[name] + length
        return inner(**call)

    tokens = embedded(host, call)
    _check_length(host, length + tokens.shape[1])
    call["inputs_embeds"] = where.insert(prompt.to(tokens.dtype).expand(len(tokens), -1, -1), tokens)
    if call.get("position_ids") is not None:
        call["position_ids"] = where.positions(call["position_ids"])
    if call.get("token_type_ids") is not None:
        types = call["token_type_ids"]
        call["token_type_ids"] = where.insert(types.amin(1, keepdim=True).expand(-1, length), types)
    if call.get("cache_position") is not None:
        call["cache_position"] = torch.arange(length + tokens.shape[1], device=tokens.device)
    output = inner(**call)
    return output if keep else strip_virtual_tokens(output, where.remove, getattr(host, "pooler", None))


def prepend_to_embedded(host: Any, inner: Call, call: Mapping[str, Any], prompt: Tensor, first: str) -> Any:
    """Call a module that takes and returns (batch, tokens, features) with virtual tokens inserted.

    Padding may be marked by ``attention_mask`` (zero at padding) or ``src_key_padding_mask`` (True at padding).

    Args:
        host: Such a module, for example torch's encoder.
        inner: Call of the host without the adapter.
        call: Arguments by name.
        prompt: Virtual tokens (p, features), or (batch, p, features) with a separate prompt for each row.
        first: Name of the argument that is (batch, tokens, features).
    """
    call = dict(call)
    x: Tensor = call.pop(first)
    mask, padding = call.get("attention_mask"), call.get("src_key_padding_mask")
    for name in ("mask", "src_mask", "attn_mask"):
        if call.get(name) is not None:
            raise ValueError(f"Virtual tokens cannot extend {name!r} of {type(host).__name__}; use a padding mask.")
    if padding is not None and padding.dtype != torch.bool:
        raise ValueError(f"src_key_padding_mask must be boolean where virtual tokens enter, got {padding.dtype}.")
    where = Insertion(prompt.shape[-2], ~padding if padding is not None else mask)
    if mask is not None:
        call["attention_mask"] = where.mask(mask)
    if padding is not None:
        call["src_key_padding_mask"] = ~where.mask(~padding)
    output = inner(where.insert(prompt.to(x.dtype).expand(len(x), -1, -1), x), **call)
    return strip_virtual_tokens(output, where.remove)


def prepend_to_blocks(host: Any, inner: Call, call: Mapping[str, Any], prompt: Tensor, first: str) -> Any:
    """Call the first of several blocks with virtual tokens before its input; they remain in its output.

    Arguments are those of ``prepend_to_embedded``.
    """
    call = dict(call)
    x: Tensor = call.pop(first)
    for name, value in call.items():
        if value is not None and "mask" in name:
            raise ValueError(f"Virtual tokens cannot extend {name!r} of a list of blocks; target a module around it.")
    where = Insertion(prompt.shape[-2], None)
    return inner(where.insert(prompt.to(x.dtype).expand(len(x), -1, -1), x), **call)


def embedded(host: Any, call: dict[str, Any], hidden: Tensor | None = None) -> Tensor:
    """Return the embeddings of a call's tokens and remove ``input_ids`` from it; those of ``hidden`` are arbitrary.

    For RoBERTa and similar models, which compute positions from ids, ``position_ids`` are added to the call.
    """
    embeddings: Tensor | None = call.get("inputs_embeds")
    if embeddings is not None:
        return embeddings
    ids = call.pop("input_ids")
    padding = getattr(getattr(getattr(host, "embeddings", None), "position_embeddings", None), "padding_idx", None)
    if padding is not None and call.get("position_ids") is None:
        is_token = ids.ne(padding)
        call["position_ids"] = is_token.cumsum(1) * is_token + padding
    return cast(Tensor, host.get_input_embeddings()(ids if hidden is None else ids.masked_fill(hidden, 0)))


def names_of(host: nn.Module) -> list[str]:
    """Return the names of the positional arguments of a module's forward."""
    return list(inspect.signature(type(host).forward).parameters)[1:]


def _lead(mask: Tensor) -> Tensor | None:
    """Return the number of padding tokens that each row begins with, (batch, 1); None if no row is known to."""
    lead = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    lead = lead.where(lead < mask.shape[-1], 0)  # rows of padding alone, with which some samplers fill batches
    can_read = lead.device.type == "cpu" and not torch.compiler.is_compiling()  # else it waits, or breaks the graph
    return None if can_read and not lead.any() else lead


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return x[row, index[row]]; unlike ``gather``, it saves only the index for backward."""
    flat = index + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, flat.flatten()).view(*flat.shape, *x.shape[2:])


def _check_cache(host: Any, call: Mapping[str, Any], cached: Any, length: int) -> None:
    """Raise for a cache that does not hold the virtual tokens and all tokens before those of the call."""
    mask = call.get("attention_mask")
    tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if mask is not None and cached != (expected := length + mask.shape[1] - tokens.shape[1]):
        raise ValueError(
            f"The cache given to {type(host).__name__} holds {cached} tokens, expected {expected}: {length} virtual "
            f"tokens and what attention_mask {tuple(mask.shape)} covers before the {tokens.shape[1]} tokens of this "
            f"call. Let generate build the cache itself, without an assistant model, or use use_cache=False."
        )


def _check_length(host: Any, tokens: int) -> None:
    limit = from_config(host, "max_position_embeddings")
    if limit is not None and tokens > limit > 0:
        raise ValueError(
            f"{tokens} positions, virtual tokens included, are more than the model's {limit}; shorten the text."
        )
