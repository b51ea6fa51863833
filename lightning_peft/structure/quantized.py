"""Linear layers whose weight is stored in few bits: our own, and what is known about those of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.sharded_tensors import sample_values
from . import bitsandbytes_api, torchao_api
from .layer_types import FOREIGN, LinearType, is_called_linear, layer_of

_ORIGINAL = "_peft_original"


@dataclass(frozen=True)
class Original:
    """What a quantized layer keeps of the weight that it had.

    Args:
        cls: Class of the layer.
        dtype: Type of the weight.
        shape: Shape of the weight, as the layer stored it.
        values: Up to 64 of its values, for fingerprints; None as long as it has none.
        transposed: Whether the layer stored its weight as (in, out).
        squared_error: Sum of the squared differences between quantized and original weight.
        squared_norm: Sum of the squares of the original weight.
    """

    cls: type[nn.Module]
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Tensor | None
    transposed: bool
    squared_error: float = 0.0
    squared_norm: float = 0.0


def sample(weight: Tensor) -> Tensor:
    """Return up to 64 values of a weight, evenly spread, rounded to bfloat16."""
    return sample_values(weight, 64).bfloat16().cpu()


def original_of(host: nn.Module) -> Original | None:
    """Return what a layer that ``quantize`` changed keeps of its weight; a plain attribute, so copies have it too."""
    return vars(host).get(_ORIGINAL)


def remember(host: nn.Module, original: Original | None) -> None:
    """Keep the original of a layer; None forgets it."""
    vars(host)[_ORIGINAL] = original


class QuantizedType(LinearType):
    """A linear layer whose weight has to be computed from what it stores.

    Args:
        dequantized: Computes the weight of a host, as (out, in), in a floating type.
    """

    def __init__(self, dequantized: Callable[[Any], Tensor]) -> None:
        self.dequantized = dequantized

    @torch.no_grad()
    def read(self, host: Any) -> Tensor:
        return self.dequantized(host)

    def full_shape(self, host: Any) -> torch.Size:
        return torch.Size((host.out_features, host.in_features))

    def write(self, host: Any, rows: Tensor, first: int = 0) -> None:
        """Refuse: what ``read`` returns is not what is stored."""
        raise TypeError(f"{type(host).__name__} stores its weight in few bits; dequantize before merging.")


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is stored in few bits."""
    return is_called_linear(module) and isinstance(layer_of(module), QuantizedType)


class QuantizedLinear(nn.Linear):
    """Linear layer over frozen codes and statistics; both passes decode them anew, so no decoded weight is kept."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.decode, self.stored())  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def stored(self) -> list[Tensor]:
        """Return codes and statistics."""
        return [self.weight, *self._buffers.values()]  # type: ignore[list-item]

    @staticmethod
    def decode(*stored: Tensor) -> Tensor:
        """Return the weight as (out, in), in float32."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, new in self._buffers.items():
            old = before[name]
            if old is not None and new is not None and new.dtype != old.dtype:  # rounded statistics: other weights
                self._buffers[name] = old.to(new.device)
        return self


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

    Its own tensor type is not kept: it cannot be copied where a weight has few blocks.
    """

    def encode(self, weight: Tensor, nf4: torchao_api.StoredNF4) -> None:
        """Store a weight of shape (out, in), of which torchao made ``nf4``."""
        flat = ~nf4.factor.isfinite()  # blocks that are all alike: nothing is left to scale
        self.weight = nn.Parameter(nf4.codes.view(len(weight), -1), requires_grad=False)  # (out, in / 2)
        self.register_buffer("codes8", nf4.codes8.masked_fill(flat[:, None], 0))
        self.register_buffer("factor", nf4.factor.masked_fill(flat, 1.0))
        self.register_buffer("mean", nf4.mean)
        self.register_buffer("codebook", nf4.codebook)

    @staticmethod
    def decode(*stored: Tensor) -> Tensor:
        codes, codes8, factor, mean, codebook = stored
        absmax = (codes8 / factor[:, None]).flatten() + mean
        values = codebook[torch.stack([codes >> 4, codes & 15], -1).int()]  # the first value is in the high half
        return (values.view(len(absmax), -1) * absmax[:, None]).view(len(codes), -1)


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


def _own(host: Any) -> Tensor:
    return cast(Tensor, host.decode(*host.stored()))


_OWN = QuantizedType(_own)
layer_of.register(QuantizedLinear)(lambda host: _OWN)
FOREIGN[bitsandbytes_api.LINEAR_4BIT] = QuantizedType(bitsandbytes_api.read_4bit)
FOREIGN[bitsandbytes_api.LINEAR_8BIT] = QuantizedType(bitsandbytes_api.read_8bit)
for _name in torchao_api.WEIGHTS:
    FOREIGN[_name] = QuantizedType(torchao_api.read)
