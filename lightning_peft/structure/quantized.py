"""Linear layers whose weight is stored in few bits: our own, and what is known about those of other libraries."""

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


def check_not_repacked(modules: Mapping[str, nn.Module]) -> None:
    """Raise where bitsandbytes has stored weights anew for inference on the CPU, which no gradient passes."""
    for name, module in modules.items():
        if getattr(vars(module).get("quant_state"), "packing_format_for_cpu", False):
            raise ValueError(f"{name} was repacked by bitsandbytes for inference; load the model again, then inject.")


def keep_differentiable(modules: Iterable[nn.Module]) -> None:
    """Keep bitsandbytes from storing weights anew in eval mode: rounded, and without gradients for the input."""
    for module in modules:
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def _linear_4bit(host: Any) -> Tensor:
    from bitsandbytes import functional

    data, state = host.weight.detach(), getattr(host.weight, "quant_state", None) or host.quant_state
    if state is None:  # not quantized yet: moving it to a device does that
        return cast(Tensor, data)
    if getattr(state, "packing_format_for_cpu", False):  # what a forward in eval mode makes of it on some processors
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


def _own(host: Any) -> Tensor:
    return cast(Tensor, host.decode(*host.stored()))


_OWN = QuantizedType(_own)
layer_of.register(QuantizedLinear)(lambda host: _OWN)
FOREIGN["bitsandbytes.nn.modules.Linear4bit"] = QuantizedType(_linear_4bit)
FOREIGN["bitsandbytes.nn.modules.Linear8bitLt"] = QuantizedType(_linear_8bit)
for _name in (
    "torchao.utils.TorchAOBaseTensor",
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor",
    "torchao.dtypes.nf4tensor.NF4Tensor",  # until torchao 0.17
):
    FOREIGN[_name] = QuantizedType(_torchao)  # the type of the weight, in a layer of torch
