"""``Insertion`` and ``prepend_to_...``: virtual tokens enter a call with embedded tokens, and leave its output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Call
from ...ops.value_checks import reading_is_free
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
        """Return positions in which virtual tokens have the first p, and the positions of tokens are p larger.

        Positions of several axes, as those of images, are (axes, batch, n).
        """
        if positions.dim() == 3:
            return torch.stack([self.positions(axis) for axis in positions])
        if self.index is not None:
            positions = positions.expand(len(self.index), -1)
            first = positions.gather(1, self.index.argmin(1, keepdim=True).clamp(max=positions.shape[1] - 1))
        else:
            first = positions[:, :1]
        moved = torch.where(positions >= first, positions + self.length, positions)
        return self.insert(first + torch.arange(self.length, device=positions.device), moved)


def prepend_to_embedded(
    host: Any, inner: Call, call: Mapping[str, Any], virtual: Callable[[], Tensor], length: int, first: str
) -> Any:
    """Call a module that takes and returns (batch, tokens, features) with virtual tokens inserted.

    Padding may be marked by ``attention_mask`` (zero at padding) or ``src_key_padding_mask`` (True at padding).

    Args:
        host: Such a module, for example torch's encoder.
        inner: Call of the host without the adapter.
        call: Arguments by name.
        virtual: Computes virtual tokens (p, features), or (batch, p, features) with a separate prompt for each row.
        length: Their number p.
        first: Name of the argument that is (batch, tokens, features).
    """
    call = dict(call)
    x = _tokens(host, call, first)
    mask, padding = call.get("attention_mask"), call.get("src_key_padding_mask")
    for name in ("mask", "src_mask", "attn_mask"):
        if call.get(name) is not None:
            raise ValueError(f"Virtual tokens cannot extend {name!r} of {type(host).__name__}; use a padding mask.")
    if padding is not None and padding.dtype != torch.bool:
        raise ValueError(f"src_key_padding_mask must be boolean where virtual tokens enter, got {padding.dtype}.")
    where = Insertion(length, ~padding if padding is not None else mask)
    if mask is not None:
        call["attention_mask"] = where.mask(mask)
    if padding is not None:
        call["src_key_padding_mask"] = ~where.mask(~padding)
    output = inner(where.insert(virtual().to(x.dtype).expand(x.shape[0], -1, -1), x), **call)
    return strip_virtual_tokens(output, where.remove)


def prepend_to_blocks(
    host: Any, inner: Call, call: Mapping[str, Any], virtual: Callable[[], Tensor], length: int, first: str
) -> Any:
    """Call the first of several blocks with virtual tokens before its input; they remain in its output.

    Arguments are those of ``prepend_to_embedded``.
    """
    call = dict(call)
    x = _tokens(host, call, first)
    for name, value in call.items():
        if value is not None and "mask" in name:
            raise ValueError(f"Virtual tokens cannot extend {name!r} of a list of blocks; target a module around it.")
    where = Insertion(length, None)
    return inner(where.insert(virtual().to(x.dtype).expand(x.shape[0], -1, -1), x), **call)


def _tokens(host: nn.Module, call: dict[str, Any], first: str) -> Tensor:
    """Remove the first argument of a call and return it; raise where it is not (batch, tokens, features)."""
    x: Tensor = call.pop(first)
    if x.dim() != 3:
        raise TypeError(
            f"{type(host).__name__} was given {tuple(x.shape)}, where virtual tokens need (batch, tokens, features); "
            f"target other modules, or use LoRA."
        )
    return x


def names_of(host: nn.Module) -> list[str]:
    """Return the names of the positional arguments of a module's forward."""
    return list(inspect.signature(type(host).forward).parameters)[1:]


def _lead(mask: Tensor) -> Tensor | None:
    """Return the number of padding tokens that each row begins with, (batch, 1); None if no row is known to."""
    can_read = reading_is_free(mask)
    if can_read and bool(mask[:, :1].all()):
        return None
    lead = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    lead = lead.where(lead < mask.shape[-1], 0)  # rows of padding alone, with which some samplers fill batches
    return None if can_read and not lead.any() else lead


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return x[row, index[row]]; unlike ``gather``, it saves only the index for backward."""
    flat = index + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, flat.flatten()).view(*flat.shape, *x.shape[2:])
