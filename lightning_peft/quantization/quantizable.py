"""``quantizable_weights`` returns what ``quantize`` changes, or says why a layer or experts cannot be quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ..core.adapted_module import adapters
from ..core.injection_record import get_record
from ..structure.base_model import base_modules, count_owners
from ..structure.expert_layers import expert_weights
from ..structure.expert_selection import ExpertTarget, expert_targets
from ..structure.layer_of import is_called_linear, layer_of
from ..structure.layer_types import TransposedLinearType
from ..structure.quantized import QuantizedType
from ..structure.selection import selected_targets
from .quantize_experts import check_experts_quantizable


def quantizable_weights(
    model: nn.Module, kind: str, targets: Sequence[str] = ("all-linear",)
) -> tuple[dict[str, nn.Module], list[ExpertTarget]]:
    """Return the layers by name, and weights of experts, that ``quantize`` would change; errors are those of it."""
    if get_record(model) is not None or any(adapters(model)):
        raise RuntimeError("This model is adapted already; quantize before inject.")
    modules, meant_by = base_modules(model), selected_targets(model, list(targets), experts=True)
    experts = expert_targets(model, meant_by)
    hosts = {name: modules[name] for name in meant_by if not expert_weights(modules[name])}
    owners = count_owners(model)
    for target in experts:
        check_experts_quantizable(target, kind, owners[id(target.weight.parameter(target.host))] > 1)
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    read = {id(module) for encoder in encoders for module in encoder.modules()}
    for name, host in hosts.items():
        _check_quantizable(name, host, read=id(host) in read, shared=owners[id(getattr(host, "weight", None))] > 1)
    return hosts, experts


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
