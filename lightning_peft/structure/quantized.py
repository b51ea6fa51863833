"""``QuantizedType``: layer types whose weight is stored in few bits, of this package, bitsandbytes and torchao."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import bitsandbytes_api, torchao_api
from .layer_of import FOREIGN, is_called_linear, layer_of
from .layer_types import LinearType
from .quantized_experts import QuantizedExperts
from .quantized_linear import QuantizedLinear


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
    """Return whether a module is a linear layer, or holds experts, whose weights are stored in few bits."""
    if isinstance(module, QuantizedExperts):
        return True
    return is_called_linear(module) and isinstance(layer_of(module), QuantizedType)


def quantized_weights(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Yield the parameter that holds the codes of each quantized weight, and the number of values it stands for."""
    for module in model.modules():
        if isinstance(module, QuantizedExperts):
            for part in module.quantized_parts():
                yield module._parameters[part], module.shape_of(part).numel()  # type: ignore[misc]
        elif is_quantized(module):
            yield module.get_parameter("weight"), layer_of(module).shape(module).numel()


def _quantized_linear(host: Any) -> Tensor:
    return cast(Tensor, host.decode(*host.stored()))


_QUANTIZED_LINEAR = QuantizedType(_quantized_linear)
layer_of.register(QuantizedLinear)(lambda host: _QUANTIZED_LINEAR)
FOREIGN[bitsandbytes_api.LINEAR_4BIT] = QuantizedType(bitsandbytes_api.read_4bit)
FOREIGN[bitsandbytes_api.LINEAR_8BIT] = QuantizedType(bitsandbytes_api.read_8bit)
for _name in torchao_api.WEIGHTS:
    FOREIGN[_name] = QuantizedType(torchao_api.read)
