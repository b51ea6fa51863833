"""``QuantizedType``: layer types whose weight is stored in few bits, of this package, bitsandbytes and torchao."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import bitsandbytes_api, torchao_api
from .layer_of import FOREIGN, is_called_linear, layer_of
from .layer_types import LinearType
from .quantized_linear import QuantizedLinear

_ORIGINAL = "_peft_original"  # attribute of a layer that ``quantize`` changed


@dataclass(frozen=True)
class Original:
    """Facts about a layer's original weight that ``quantize`` keeps on the layer.

    Args:
        cls: Class of the layer before.
        dtype: Type of the original weight.
        shape: Shape of the original weight, as the layer stored it.
        values: Up to 64 of its values, for fingerprints; None while the weight has no values (meta device).
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


def original_of(host: nn.Module) -> Original | None:
    """Return the ``Original`` of a layer that ``quantize`` changed, or None; copies of the layer have it too."""
    return vars(host).get(_ORIGINAL)


def remember(host: nn.Module, original: Original | None) -> None:
    """Set the ``Original`` of a layer; None removes it."""
    vars(host)[_ORIGINAL] = original


class QuantizedType(LinearType):
    """Linear layers whose weight has to be computed from codes and statistics.

    Args:
        dequantized: Function that computes the weight of a host, as (out, in), in a floating type.
    """

    def __init__(self, dequantized: Callable[[Any], Tensor]) -> None:
        self.dequantized = dequantized

    @torch.no_grad()
    def read(self, host: Any) -> Tensor:
        return self.dequantized(host)

    def full_shape(self, host: Any) -> torch.Size:
        return torch.Size((host.out_features, host.in_features))

    def write(self, host: Any, rows: Tensor, first: int = 0) -> None:
        """Raise a ``TypeError``, since the layer stores codes and not the weight that ``read`` returns."""
        raise TypeError(f"{type(host).__name__} stores its weight in few bits; dequantize before merging.")


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a linear layer whose weight is stored in few bits."""
    return is_called_linear(module) and isinstance(layer_of(module), QuantizedType)


def _quantized_linear(host: Any) -> Tensor:
    return cast(Tensor, host.decode(*host.stored()))


_QUANTIZED_LINEAR = QuantizedType(_quantized_linear)
layer_of.register(QuantizedLinear)(lambda host: _QUANTIZED_LINEAR)
FOREIGN[bitsandbytes_api.LINEAR_4BIT] = QuantizedType(bitsandbytes_api.read_4bit)
FOREIGN[bitsandbytes_api.LINEAR_8BIT] = QuantizedType(bitsandbytes_api.read_8bit)
for _name in torchao_api.WEIGHTS:
    FOREIGN[_name] = QuantizedType(torchao_api.read)
