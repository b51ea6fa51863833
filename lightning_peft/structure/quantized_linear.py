"""``Int8Linear`` and ``NF4Linear``: linear layers over frozen codes and statistics, decoded anew in each pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autograd_function import records_gradients
from .original_weight import cast_originals
from .torchao_api import StoredNF4


class KeepsStatistics(nn.Module):
    """Base class of modules whose buffers are statistics of codes, which keep their type when the module is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, new in self._buffers.items():
            old = before[name]
            if old is not None and new is not None and new.dtype != old.dtype:  # rounding statistics changes weights
                self._buffers[name] = old.to(new.device)
        cast_originals(self, fn)
        return self


class QuantizedLinear(KeepsStatistics, nn.Linear):
    """Linear layer over frozen codes and statistics. Both passes decode them, so no decoded weight is saved."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if records_gradients():
            y = _Product.apply(x, self.decode, self.stored())  # type: ignore[no-untyped-call]
        else:
            y = F.linear(x, self.decode(*self.stored()).to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def stored(self) -> list[Tensor]:
        """Return the codes and, after them, the statistics: the arguments of ``decode``."""
        return [self.weight, *self._buffers.values()]  # type: ignore[list-item]

    @staticmethod
    def decode(*stored: Tensor) -> Tensor:
        """Return the weight as (out, in), in float32."""
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """W = scale * codes, with codes from -127 to 127 and one scale for each row."""

    def encode(self, weight: Tensor) -> None:
        """Store a weight of shape (out, in)."""
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)  # (out, 1)

    @staticmethod
    def decode(*stored: Tensor) -> Tensor:
        codes, scale = stored
        return codes * scale


class NF4Linear(QuantizedLinear):
    """W = codebook[codes] * absmax of 64 values, with absmax = codes8 / factor + mean; quantized by torchao.

    torchao's ``NF4Tensor`` is not stored, since it cannot be copied where a weight has few blocks.
    """

    def encode(self, weight: Tensor, nf4: StoredNF4) -> None:
        """Store a weight of shape (out, in), which torchao quantized to ``nf4``."""
        flat = ~nf4.factor.isfinite()  # of blocks whose scales are all equal
        self.weight = nn.Parameter(nf4.codes.view(len(weight), -1), requires_grad=False)  # (out, in / 2)
        self.register_buffer("codes8", nf4.codes8.masked_fill(flat[:, None], 0))
        self.register_buffer("factor", nf4.factor.masked_fill(flat, 1.0))
        self.register_buffer("mean", nf4.mean)
        self.register_buffer("codebook", nf4.codebook)

    @staticmethod
    def decode(*stored: Tensor) -> Tensor:
        codes, codes8, factor, mean, codebook = stored
        absmax = (codes8 / factor[..., None]).flatten(-2) + mean[..., None]
        values = codebook[torch.stack([codes >> 4, codes & 15], -1).int()]  # the first value is in the high half
        blocks = values.view(*codes.shape[:-2], absmax.shape[-1], -1) * absmax[..., None]
        return blocks.view(*codes.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """x W^T for a frozen W that is decoded in each pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Callable[..., Tensor], stored: list[Tensor]) -> Tensor:
        ctx.decode = decode
        ctx.save_for_backward(*stored)
        return F.linear(x, decode(*stored).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight: Tensor = ctx.decode(*ctx.saved_tensors)
        return grad @ weight.to(grad.dtype), None, None
