"""Weights that torch's attention reads from its modules, instead of calling a layer."""

from __future__ import annotations

from torch import nn


def read_weight_attribute(cls: type[nn.Module]) -> str | None:
    """Return the name of the weight that torch's attention reads from modules of this class without calling them."""
    if issubclass(cls, nn.MultiheadAttention):
        return "in_proj_weight"
    return "weight" if issubclass(cls, nn.modules.linear.NonDynamicallyQuantizableLinear) else None


def read_bias_attribute(cls: type[nn.Module]) -> str:
    """Return the name of the bias that belongs to that weight."""
    return (read_weight_attribute(cls) or "weight").replace("weight", "bias")
