"""``DroppedLowRank``: a low-rank product of inputs after dropout, which saves the mask as bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused_linear import autocast_disabled


def draw_mask(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """Return which inputs are kept, the same as bits, and the probability with which they are not."""
    step = round(p * 65536)
    flags = _draws(-(-x.numel() // 8) * 8, x.device) >= step - 32768
    kept = flags[: x.numel()].view(x.shape)
    return kept, _pack(flags), step / 65536


def _draws(count: int, device: torch.device) -> Tensor:
    """Return random numbers, each of the 65536 of int16 with equal probability; ``count`` is a multiple of eight."""
    if torch.compiler.is_compiling():  # which cannot trace random_
        return torch.randint(-32768, 32768, (count,), device=device)
    words = torch.empty(count // 4, dtype=torch.int64, device=device)
    return words.random_(torch.iinfo(torch.int64).min, None).view(torch.int16)  # a fourth of the time of floats


def _pack(flags: Tensor) -> Tensor:
    """Return booleans, a multiple of eight in number, as bits: the first of eight in the lowest bit."""
    # Eight booleans, read as one integer, are eight bytes of 0 or 1. The product adds shifted copies of it, so that bit
    # i of its highest byte is byte i of the integer; the shift moves that byte down, and uint8 drops the sign bits.
    # Byte i is boolean i on little-endian machines alone (x86, ARM); others would need the factor's bytes reversed.
    gathered = (flags.view(torch.int64) * 0x0102040810204080) >> 56
    return gathered.to(torch.uint8)


def _unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the inverse of ``_pack`` as zeros and ones, in bytes; bits behind the last element are padding."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).flatten()[: shape.numel()].view(shape)


class DroppedLowRank(torch.autograd.Function):
    """scale dropout(x) A^T B^T, where ``kept`` marks the inputs that were not dropped; saves x and ``bits``."""

    @staticmethod
    def forward(
        x: Tensor, kept: Tensor, bits: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        return F.linear(F.linear((x * kept).to(dtype), a.to(dtype)), (b * scale).to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, bits, a, b, ctx.scale, _ = inputs
        ctx.save_for_backward(x, bits, a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        g = grads[0].flatten(0, -2)
        x, bits, a, b = ctx.saved_tensors
        kept = _unpack(bits, x.shape).flatten(0, -2)
        with autocast_disabled(g):
            narrow_a, by_inner = a.to(g.dtype), g @ (b * ctx.scale).to(g.dtype)
            by_x = None
            if ctx.needs_input_grad[0]:
                by_x = (by_inner @ narrow_a).mul_(kept).to(x.dtype).view(x.shape)
            dropped = (x.flatten(0, -2) * kept).to(g.dtype)
            by_a, by_b = by_inner.T @ dropped, g.T @ (dropped @ narrow_a.T) * ctx.scale
        return by_x, None, None, by_a.to(a.dtype), by_b.to(b.dtype), None, None
