"""``quantize_shapes`` gives layers without values the storage of quantized ones, for the memory plan.

``quantize`` keeps the full weight of such layers on the meta device until values are read into it; here nothing is read
later, and the shapes of codes and scales are what counts.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.expert_layers import ExpertWeight
from ..structure.layer_of import layer_of
from ..structure.quantized_linear import Int8Linear, NF4Linear
from ..structure.torchao_api import StoredNF4
from .nf4 import BLOCK
from .quantizable import quantizable_weights
from .quantize_experts import become_quantized, int8, register_codes

_BLOCKS = 256  # blocks whose scales share one second-level scale


def quantize_shapes(model: nn.Module, kind: str) -> nn.Module:
    """Turn the layers that ``quantize`` would change into quantized ones, in place and without values.

    ``nf4`` stores 4 bits for each value + 8 for each 64 of them + 32 for each 256 times 64; ``int8`` 8 bits for each
    value + 32 for each row.

    Args:
        model: A model that is not adapted yet, on the meta device or within ``shapes_only``.
        kind: ``nf4`` or ``int8``.

    Raises:
        TypeError: A layer of the blocks cannot be quantized.
        ValueError: A layer is of a shape that nf4 does not store, or shares its weight.
        RuntimeError: Adapters were injected already.
    """
    hosts, experts = quantizable_weights(model, kind)
    for name, host in hosts.items():
        _store(name, host, kind)
    for host, of_host in itertools.groupby(experts, key=lambda target: target.host):
        _store_experts(host, [target.weight for target in of_host], kind)
    return model


def _store_experts(host: Any, weights: list[ExpertWeight], kind: str) -> None:
    become_quantized(host, weights, kind)
    for weight in weights:
        stored = weight.parameter(host).detach()
        if kind == "int8":
            register_codes(host, weight.part, int8(stored, weight.transposed))
            continue
        blocks = stored[0].numel() // BLOCK
        codes, *statistics, codebook = _empty_nf4(stored[0], blocks // math.gcd(blocks, _BLOCKS))
        of_all = [x.new_empty(len(stored), *x.shape) for x in statistics]
        codes = codes.new_empty(*stored.shape[:2], stored.shape[2] // 2)
        register_codes(host, weight.part, [codes, *of_all, codebook])


def _store(name: str, host: Any, kind: str) -> None:
    weight = torch.empty_like(layer_of(host).read(host).detach())
    host.out_features, host.in_features = weight.shape  # Conv1D calls them otherwise
    if kind == "int8":
        host.__class__ = Int8Linear
        host.encode(weight)
        return
    if weight.numel() % BLOCK:
        raise ValueError(f"{name} of shape {tuple(weight.shape)} has no nf4, which takes blocks of {BLOCK} values.")
    host.__class__ = NF4Linear
    blocks = weight.numel() // BLOCK
    groups = next(n for n in itertools.count(-(-blocks // _BLOCKS)) if blocks % n == 0)
    host.encode(weight, _empty_nf4(weight, groups))


def _empty_nf4(weight: Tensor, groups: int) -> StoredNF4:
    """Return empty tensors of the shapes of what ``to_nf4`` returns, for a number of groups of scales."""
    numbers, blocks = weight.numel(), weight.numel() // BLOCK
    return StoredNF4(
        codes=weight.new_empty(numbers // 2, dtype=torch.uint8),
        codes8=weight.new_empty(groups, blocks // groups, dtype=torch.int8),
        factor=weight.new_empty(groups, dtype=torch.float32),
        mean=weight.new_empty((), dtype=torch.float32),
        codebook=weight.new_empty(16, dtype=torch.float32),
    )
