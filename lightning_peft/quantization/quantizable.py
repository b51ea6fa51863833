"""``quantizable_layers`` returns the layers that ``quantize`` changes, or says why one cannot be quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ..core.adapted_module import adapters
from ..core.injection_record import get_record
from ..structure.base_model import count_owners
from ..structure.layer_of import is_called_linear, layer_of
from ..structure.layer_types import TransposedLinearType
from ..structure.quantized import QuantizedType
from ..structure.selection import select_modules


def quantizable_layers(model: nn.Module, targets: Sequence[str] = ("all-linear",)) -> dict[str, nn.Module]:
    """Return the layers that ``quantize`` would change, by name; errors are those of ``quantize``."""
    if get_record(model) is not None or any(adapters(model)):
        raise RuntimeError("This model is adapted already; quantize before inject.")
    hosts = select_modules(model, list(targets))
    owners = count_owners(model)
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    read = {id(module) for encoder in encoders for module in encoder.modules()}
    for name, host in hosts.items():
        _check_quantizable(name, host, read=id(host) in read, shared=owners[id(getattr(host, "weight", None))] > 1)
    return hosts


def _check_quantizable(name: str, host: Any, read: bool, shared: bool) -> None:
    """Raise if a layer cannot be quantized."""
    kind = type(host).__name__
    if not is_called_linear(host):
        raise TypeError(f"{name} is a {kind}, no linear layer that is called; quantize all-linear or other targets.")
    layer = layer_of(host)
    if isinstance(layer, QuantizedType):
        raise ValueError(f"{name} is quantized already; dequantize it first, or choose other targets.")
    plain = isinstance(layer, TransposedLinearType) or type(host).forward is nn.Linear.forward
    if not plain or "forward" in vars(host) or "weight" not in host._parameters or isinstance(host.weight, DTensor):
        raise TypeError(f"{name} ({kind}) is no plain linear layer: it computes, or its weight is stored, in another "
                        f"way. Quantize before it is changed or sharded, or choose other targets.")  # fmt: skip
    if read:
        raise TypeError(f"{name} belongs to nn.TransformerEncoderLayer, which reads its weight; choose other targets.")
    if not host.weight.is_floating_point():
        raise TypeError(f"{name} stores {host.weight.dtype}; only floating weights can be quantized.")
    if shared:
        raise ValueError(f"{name} shares its weight with another module; untie it, or choose other targets.")
