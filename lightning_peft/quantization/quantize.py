"""``quantize`` stores the linear layers and the experts of a frozen base in 4 or 8 bits (QLoRA, https://arxiv.org/abs/2305.14314).

A layer stays the same object: it changes its class and its weight, and keeps name, bias, hooks and references.
``dequantize`` goes back.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.active_on_host import inactive
from ..core.adapted_module import AdaptedModule, adapted_class
from ..core.fingerprint import sample
from ..structure.base_model import stored_parameter
from ..structure.bitsandbytes_api import forget_state
from ..structure.expert_selection import ExpertTarget
from ..structure.layer_of import layer_of
from ..structure.layer_types import LayerType, TransposedLinearType
from ..structure.original_weight import Original, original_of, remember
from ..structure.quantized import is_quantized
from ..structure.quantized_experts import QuantizedExperts
from ..structure.quantized_linear import Int8Linear, NF4Linear, QuantizedLinear
from . import nf4
from .quantizable import quantizable_weights
from .quantize_experts import dequantize_experts, known_original, quantize_experts, store_experts

KINDS = ("nf4", "int8")


@torch.no_grad()
def quantize(
    model: nn.Module, kind: str, targets: Sequence[str] = ("all-linear",), backend: str | None = None
) -> nn.Module:
    """Store linear layers and experts in few bits, in place, one after the other; nothing is changed if one cannot be.

    Args:
        model: Any module, on the device that it shall train on, before ``inject``. Layers without values (meta device)
            are quantized when ``FSDP2Strategy`` reads them.
        kind: "nf4", 4.127 bits for each value, doubly quantized; or "int8", with one scale for each row.
        targets: Globs on the end of module names, or roles. The paper takes all linear layers of the blocks.
        backend: Library for "nf4" of layers, "bitsandbytes" or "torchao"; None takes the first that runs on the
            model's device and stores all shapes. Experts are stored as torchao does.

    Returns:
        The model. The weights that were quantized are frozen.

    Raises:
        ValueError: A setting is unknown, a pattern matches nothing, or a weight is shared, quantized or of a shape that
            no library stores.
        TypeError: A target is no linear layer that can be quantized; names the first.
        RuntimeError: Adapters were injected already.
        ImportError: No library for "nf4" is installed that runs on the model's device.

    Examples:
        >>> model = lp.quantize(nn.Sequential(nn.Linear(64, 64)), "int8", targets=["0"])
        >>> model[0].weight.dtype, lp.active(lp.inject(model, lp.LoRA(targets=["0"])))
        (torch.int8, ('lora',))
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    if backend is not None and (kind == "int8" or backend not in nf4.LIBRARIES):
        raise ValueError(f"backend={backend!r} does not fit: nf4 has {', '.join(nf4.LIBRARIES)}; int8 needs none.")
    hosts, experts = quantizable_weights(model, kind, targets)
    if any(stored_parameter(host, "weight").is_meta for host in hosts.values()):
        backend = "torchao" if kind == "nf4" else None
    if experts and kind == "nf4":
        nf4.check_stores_experts({"cpu" if p.is_meta else p.device.type for p in map(_parameter, experts)})
    library = nf4.library_for(hosts, backend) if kind == "nf4" and hosts else None
    for host in hosts.values():
        _quantize(host, library)
    for host, of_host in itertools.groupby(experts, key=lambda target: target.host):
        quantize_experts(host, [target.weight for target in of_host], kind)
    return model


def quantize_once(model: nn.Module, kind: str, backend: str | None = None) -> None:
    """Quantize, unless this or its user did so before.

    Raises:
        RuntimeError: Adapters were injected into a base that is not quantized.
    """
    if not quantized_layers(model):
        quantize(model, kind, backend=backend)


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose weights are stored in few bits."""
    return [module for module in model.modules() if is_quantized(module)]


@torch.no_grad()
def dequantize(model: nn.Module) -> float:
    """Give every quantized layer the class and type that it had, with the weight that it computes with, in place.

    Adapters stay and work, and can be merged then. The weights stay frozen.

    Args:
        model: What ``quantize`` or another library quantized.

    Returns:
        Norm of the difference to the weights before quantization, relative to their norm; nan if they are not known.

    Raises:
        ValueError: Nothing in the model is quantized.

    Examples:
        >>> model = lp.quantize(nn.Sequential(nn.Linear(64, 64)), "int8", targets=["0"])
        >>> 0 < lp.dequantize(model) < 0.01  # how far the weights are from the original ones, relative to their norm
        True
    """
    hosts = quantized_layers(model)
    if not hosts:
        raise ValueError("There is nothing to dequantize: no layer of this model is quantized.")
    originals = [original for host in hosts for original in _originals(host)]
    with inactive(host for host in hosts if isinstance(host, AdaptedModule)):  # what hosts store, not what they show
        for host in hosts:
            dequantize_experts(host) if isinstance(host, QuantizedExperts) else _dequantize(host)
    if None in originals:
        return math.nan
    known = [original for original in originals if original is not None]
    return math.sqrt(sum(o.squared_error for o in known) / max(sum(o.squared_norm for o in known), 1e-300))


def _originals(host: nn.Module) -> list[Original | None]:
    """Return what is remembered of each quantized weight of a module; None for weights of other libraries."""
    parts = host.quantized_parts() if isinstance(host, QuantizedExperts) else ["weight"]
    return [original_of(host, part) for part in parts]


def _parameter(target: ExpertTarget) -> Tensor:
    return target.weight.parameter(target.host)


def _quantize(host: Any, library: str | None) -> None:
    stored = host.weight.detach()
    kind = layer_of(host)
    original = Original(type(host), stored.dtype, tuple(stored.shape), None, isinstance(kind, TransposedLinearType))
    weight = kind.read(host).detach().contiguous()
    host.out_features, host.in_features = weight.shape  # Conv1D calls them otherwise
    if weight.is_meta:
        host.__class__ = Int8Linear if library is None else NF4Linear
        remember(host, original)
    else:
        remember(host, dataclasses.replace(original, values=sample(stored)))
        _store(host, weight, library)


def quantize_late(host: nn.Module) -> None:
    """Quantize the weight of a layer that had no values when the model was quantized, and has them now."""
    for part in host.quantized_parts() if isinstance(host, QuantizedExperts) else ():
        if known_original(host, part).values is None:
            store_experts(host, part)
    original = original_of(host)
    if original is not None and original.values is None:
        stored = stored_parameter(host, "weight").detach()
        remember(host, dataclasses.replace(original, values=sample(stored)))
        weight = stored.T.contiguous() if original.transposed else stored
        _store(host, weight, "torchao" if isinstance(host, NF4Linear) else None)


def _store(host: Any, weight: Tensor, library: str | None) -> None:
    if library is not None:
        nf4.store(host, weight, library)
    else:
        if not isinstance(host, Int8Linear):
            host.__class__ = Int8Linear
        host.encode(weight)
    error = (layer_of(host).read(host).float() - weight.float()).square().sum().item()
    norm, original = weight.float().square().sum().item(), original_of(host)
    remember(host, None if original is None else dataclasses.replace(original, squared_error=error, squared_norm=norm))


def _dequantize(host: Any) -> None:
    original = original_of(host)
    weight = layer_of(host).read(host).detach()
    cls = nn.Linear if original is None else original.cls
    forget_state(host)
    if isinstance(host, QuantizedLinear):
        host._buffers.clear()
    remember(host, None)
    host.__class__ = adapted_class(cls, host._replaced) if isinstance(host, AdaptedModule) else cls  # type: ignore[arg-type]
    host.weight = nn.Parameter(weight if original is None else weight.to(original.dtype), requires_grad=False)
    if host.bias is not None:
        host.bias.data = host.bias.data.to(host.weight.dtype)  # bitsandbytes casts it when it is called
    layer = layer_of(host)
    if isinstance(layer, TransposedLinearType):
        host.weight = nn.Parameter(host.weight.T.contiguous(), requires_grad=False)
    if isinstance(host, AdaptedModule):
        adapter: Any
        for adapter in host.peft.values():
            if isinstance(getattr(adapter, "layer", None), LayerType):
                adapter.layer = layer
