"""``QuantizedType``: layer types whose weight is stored in few bits, of this package, bitsandbytes and torchao."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.sharded_tensors import sample_values
from .layer_types import FOREIGN, LinearType, is_called_linear, layer_of
from .quantized_linear import QuantizedLinear

_ORIGINAL = "_peft_original"


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


def sample(weight: Tensor) -> Tensor:
    """Return up to 64 values of a weight, evenly spread, rounded to bfloat16."""
    return sample_values(weight, 64).bfloat16().cpu()


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


def check_not_repacked(modules: Mapping[str, nn.Module]) -> None:
    """Raise where bitsandbytes has repacked weights for inference on the CPU, which stops all gradients."""
    for name, module in modules.items():
        if getattr(vars(module).get("quant_state"), "packing_format_for_cpu", False):
            raise ValueError(f"{name} was repacked by bitsandbytes for inference; load the model again, then inject.")


def keep_differentiable(modules: Iterable[nn.Module]) -> None:
    """Keep bitsandbytes from repacking weights in eval mode: they would be rounded, and inputs get no gradients."""
    for module in modules:
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def _linear_4bit(host: Any) -> Tensor:
    from bitsandbytes import functional

    data, state = host.weight.detach(), getattr(host.weight, "quant_state", None) or host.quant_state
    if state is None:  # not quantized yet: moving it to a device does that
        return cast(Tensor, data)
    if getattr(state, "packing_format_for_cpu", False):  # a forward in eval mode repacked it, as on some processors
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.deepcopy(state))
    return cast(Tensor, functional.dequantize_4bit(data, state))


def _linear_8bit(host: Any) -> Tensor:
    codes: Tensor = host.weight.detach()
    if codes.is_floating_point():
        return codes
    scale: Tensor = host.weight.SCB if host.state.SCB is None else host.state.SCB
    return codes * (scale[:, None] / 127)


def _torchao(host: Any) -> Tensor:
    return cast(Tensor, getattr(host.weight, "get_original_weight", host.weight.dequantize)())


def _quantized_linear(host: Any) -> Tensor:
    return cast(Tensor, host.decode(*host.stored()))


_QUANTIZED_LINEAR = QuantizedType(_quantized_linear)
layer_of.register(QuantizedLinear)(lambda host: _QUANTIZED_LINEAR)
FOREIGN["bitsandbytes.nn.modules.Linear4bit"] = QuantizedType(_linear_4bit)
FOREIGN["bitsandbytes.nn.modules.Linear8bitLt"] = QuantizedType(_linear_8bit)
for _name in (
    "torchao.utils.TorchAOBaseTensor",
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor",
    "torchao.dtypes.nf4tensor.NF4Tensor",  # until torchao 0.17
):
    FOREIGN[_name] = QuantizedType(_torchao)  # class of the weight, in an ``nn.Linear``
