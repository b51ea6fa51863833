"""Experts in few bits: how ``quantize`` stores the weights of experts, and ``dequantize`` builds them again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core.adapted_module import AdaptedModule, adapted_class
from ..core.fingerprint import sample
from ..structure.expert_layers import ExpertWeight, expert_weights
from ..structure.expert_selection import ExpertTarget
from ..structure.original_weight import Original, original_of, remember
from ..structure.quantized_experts import Codes, Int8Codes, NF4Codes, QuantizedExperts, quantized_class
from ..structure.torchao_api import to_nf4

BLOCK = 64  # values of an expert that share a scale
CODES: dict[str, type[Codes]] = {"nf4": NF4Codes, "int8": Int8Codes}


def check_experts_quantizable(target: ExpertTarget, kind: str, shared: bool) -> None:
    """Raise if a weight of experts cannot be stored."""
    host, weight, name = target.host, target.weight, target.weight_name
    parameter = weight.parameter(host)
    if isinstance(host, QuantizedExperts):
        raise ValueError(f"{name} is quantized already; dequantize it first, or choose other targets.")
    if "forward" in vars(host) or isinstance(parameter, DTensor):
        raise TypeError(f"{name} is no plain parameter: quantize before it is changed or sharded.")
    if not parameter.is_floating_point():
        raise TypeError(f"{name} stores {parameter.dtype}; only floating weights can be quantized.")
    if shared:
        raise ValueError(f"{name} shares its weight with another module; untie it, or choose other targets.")
    if kind == "nf4" and parameter[0].numel() % BLOCK:
        raise ValueError(
            f"{name} of shape {tuple(parameter.shape)} has no nf4, which takes blocks of {BLOCK} values of an expert. "
            f"Use int8 or other targets."
        )


def quantize_experts(host: Any, weights: Sequence[ExpertWeight], kind: str) -> None:
    """Store weights of a module of experts as codes; those without values (meta device) are stored later."""
    become_quantized(host, weights, kind)
    for weight in weights:
        if not weight.parameter(host).is_meta:
            store_experts(host, weight.part)


def become_quantized(host: Any, weights: Sequence[ExpertWeight], kind: str) -> None:
    """Give a module of experts the class that reads codes, before there are any."""
    all_weights = expert_weights(host)
    cls: Any = type(host)
    host.__class__ = quantized_class(cls, CODES[kind])
    host.expert_weights, host.compute_dtype = all_weights, weights[0].parameter(host).dtype
    for weight in weights:
        stored = weight.parameter(host)
        remember(host, Original(cls, stored.dtype, tuple(stored.shape), None, weight.transposed), weight.part)


def store_experts(host: Any, part: str) -> None:
    """Replace a weight that has values by its codes."""
    original, stored = known_original(host, part), host.get_parameter(part).detach()
    encode = int8 if isinstance(host.codes, Int8Codes) else _nf4
    register_codes(host, part, encode(stored, original.transposed))
    norm = error = 0.0
    for expert, weight in enumerate(stored):
        error += (host.factor(part)[expert].full().float() - weight.float()).square().sum().item()
        norm += weight.float().square().sum().item()
    known = dataclasses.replace(original, values=sample(stored), squared_error=error, squared_norm=norm)
    remember(host, known, part)


def dequantize_experts(host: Any) -> None:
    """Give a module of experts its class and weights back."""
    cls = host.experts_class
    for part in host.quantized_parts():
        weight = host.factor(part).decoded(known_original(host, part).dtype)
        for name in host.codes.statistics:
            del host._buffers[f"{part}_{name}"]
        remember(host, None, part)
        host._parameters[part] = nn.Parameter(weight, requires_grad=False)
    del host.expert_weights, host.compute_dtype
    host.__class__ = adapted_class(cls, host._replaced) if isinstance(host, AdaptedModule) else cls


def known_original(host: nn.Module, part: str) -> Original:
    """Return what is remembered of a weight of experts that is quantized."""
    if (original := original_of(host, part)) is None:
        raise ValueError(f"{part} of this {type(host).__name__} is not quantized.")
    return original


def register_codes(host: Any, part: str, tensors: Sequence[Tensor]) -> None:
    """Put codes in the place of a weight, and their statistics into buffers."""
    codes, *statistics = tensors
    host._parameters[part] = nn.Parameter(codes, requires_grad=False)
    for name, value in zip(host.codes.statistics, statistics, strict=True):
        host.register_buffer(f"{part}_{name}", value)


def int8(weight: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    """Return codes, and a scale for each output of each expert."""
    largest = weight.abs().amax(1 if transposed else 2, keepdim=True).float()
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / 127
    codes = torch.empty_like(weight, dtype=torch.int8)
    for of_expert, values, scales in zip(codes, weight, scale, strict=True):
        of_expert.copy_((values / scales).round())
    return codes, scale


def _nf4(weight: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    stored = [to_nf4(w.float(), BLOCK, math.gcd(w.numel() // BLOCK, 256)) for w in weight]
    factor = torch.stack([nf4.factor for nf4 in stored])
    flat = ~factor.isfinite()  # of blocks whose scales are all equal
    codes = torch.stack([nf4.codes for nf4 in stored]).view(*weight.shape[:2], -1)
    codes8 = torch.stack([nf4.codes8 for nf4 in stored]).masked_fill(flat[..., None], 0)
    mean = torch.stack([nf4.mean for nf4 in stored])
    return codes, codes8, factor.masked_fill(flat, 1.0), mean, stored[0].codebook
