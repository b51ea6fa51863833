"""``Original``: what ``quantize`` keeps of the weight that a layer had before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ORIGINAL = "_peft_original"  # attribute of a layer that ``quantize`` changed


@dataclass(frozen=True)
class Original:
    """Facts about a layer's original weight that ``quantize`` keeps on the layer.

    Args:
        cls: Class of the layer before.
        dtype: Type of the original weight; it follows casts of the layer.
        shape: Shape of the original weight, as the layer stored it.
        values: Up to 64 of its values, for fingerprints; None while the weight has no values (meta device).
        transposed: Whether the layer stored its weight as (in, out).
        squared_error: Sum of the squared differences between quantized and original weight.
        squared_norm: Sum of the squares of the original weight.
        dtype_before_casts: Type that the weight is quantized from if it gets its values later; None if it is ``dtype``.
    """

    cls: type[nn.Module]
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Tensor | None
    transposed: bool
    squared_error: float = 0.0
    squared_norm: float = 0.0
    dtype_before_casts: torch.dtype | None = None


def original_of(host: nn.Module, parameter: str = "weight") -> Original | None:
    """Return the ``Original`` of a weight that ``quantize`` changed, or None; copies of the layer have it too."""
    return vars(host).get(_attribute(parameter))


def remember(host: nn.Module, original: Original | None, parameter: str = "weight") -> None:
    """Set the ``Original`` of a weight; None removes it."""
    vars(host)[_attribute(parameter)] = original


def cast_originals(host: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Let the types that weights had follow a cast of the layer, by what ``fn`` would have done to the weights."""
    originals = {name: value for name, value in vars(host).items() if isinstance(value, Original)}
    for name, original in originals.items():
        dtype = fn(torch.empty(0, dtype=original.dtype)).dtype
        before = original.dtype_before_casts or original.dtype
        vars(host)[name] = dataclasses.replace(original, dtype=dtype, dtype_before_casts=before)


def _attribute(parameter: str) -> str:
    return _ORIGINAL if parameter == "weight" else f"{_ORIGINAL}_{parameter}"
