"""Folding adapters into the weights that they update."""

from __future__ import annotations

import torch
from torch import nn

from .adapter import Adapter
from .base import owners
from .hosts import adapters
from .inject import detach, injection
from .quantization import dequantize as dequantize_layers
from .quantized_layers import is_quantized


def merge(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """Fold every adapter into its host and restore the original classes: all of them, or none if one cannot.

    Args:
        model: An adapted model.
        dequantize: Whether to give a quantized base its full type back first, with the rounding that adapters were
            trained on; how far that is from the weights before quantization is printed. To merge into those instead,
            load the adapter into the base that was not quantized.

    Returns:
        The model.

    Raises:
        TypeError: A method's adapters cannot be expressed by a weight, or an adapted weight is quantized.
        ValueError: A host shares a parameter with another module, or nothing was injected.
    """
    found = list(adapters(model))
    if not found and injection(model) is None:
        raise ValueError("There is nothing to merge: no method was injected into this model.")
    held = owners(model)
    quantized = False
    for host_name, host, key, adapter in found:
        if type(adapter).merge is Adapter.merge:
            raise TypeError(f"{key!r} at {host_name} cannot be merged: {adapter.unmergeable}.")
        if any(held[id(p)] > 1 for p in host._parameters.values() if p is not None):
            raise ValueError(f"{host_name} shares a parameter with another module; untie it before merging.")
        if is_quantized(host):
            quantized = True
            if not dequantize:
                raise TypeError(
                    f"{host_name} is quantized, and rounding the result to as few bits would undo the training. Load "
                    f"the adapter into the base before quantization and merge there, or pass dequantize=True."
                )
    if quantized:
        error = dequantize_layers(model)
        print(f"Merging into dequantized weights; they differ from the original ones by {100 * error:.3g} % in norm.")
    for _, host, _, adapter in found:  # in order: inner before outer
        with torch.no_grad():
            adapter.merge(host)
    return detach(model)
