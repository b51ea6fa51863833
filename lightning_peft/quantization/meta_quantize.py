"""What a quantized base stores, in shapes alone, since a plan has no values to quantize."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.layer_types import is_called_linear, layer_of
from ..structure.quantized import Int8Linear, NF4Linear
from ..structure.selection import select_modules
from .nf4 import BLOCK

_BLOCKS = 256  # whose scales have one in common


def quantize_shapes(model: nn.Module, kind: str) -> nn.Module:
    """Turn the layers that ``quantize`` takes into such as it makes of them, in place and without values.

    ``nf4`` stores 4 bits for each value + 8 for each 64 of them + 32 for each 256 times 64; ``int8`` 8 bits for each
    value + 32 for each row.

    Args:
        model: A model that is not adapted yet, on the meta device or within ``shapes_only``.
        kind: ``nf4`` or ``int8``.

    Raises:
        TypeError: A layer of the blocks is none that is called.
        ValueError: A layer is of a shape that nf4 does not store.
    """
    for name, host in select_modules(model, ["all-linear"]).items():
        if not is_called_linear(host):
            raise TypeError(f"{name} is a {type(host).__name__}, no linear layer that is called, and has no {kind}.")
        _store(name, host, kind)
    return model


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
    host.encode(weight, _stored_in_4_bits(weight))


def _stored_in_4_bits(weight: Tensor) -> Any:
    """Return what torchao's ``NF4Tensor`` holds."""
    numbers, blocks = weight.numel(), weight.numel() // BLOCK
    scales = next(n for n in itertools.count(-(-blocks // _BLOCKS)) if blocks % n == 0)
    return SimpleNamespace(
        quantized_data=weight.new_empty(numbers // 2, dtype=torch.uint8),
        quantized_scalers=weight.new_empty(blocks, dtype=torch.int8),
        quantization_factor=weight.new_empty(scales, dtype=torch.float32),
        scaler_mean=weight.new_empty((), dtype=torch.float32),
        nf4=weight.new_empty(16, dtype=torch.float32),
    )
