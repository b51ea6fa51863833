"""``add_bottleneck``: two thin layers with an activation between them; ``output_of``: output width of a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.method import check_setting
from ...ops.factor_type import in_type
from ...structure.base_model import base_modules
from ...structure.layer_of import is_called_linear, layer_of
from ...structure.read_weights import read_weight_attribute

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}
Layer = tuple[Tensor, Tensor | None]  # a weight and a bias


def check_bottleneck(size: int, activation: str) -> None:
    """Raise a ``ValueError`` for settings that no bottleneck can have."""
    check_setting(isinstance(size, int) and size > 0, "size", size, "a positive whole number")
    check_setting(activation in ACTIVATIONS, "activation", activation, f"one of {', '.join(ACTIVATIONS)}")


def add_bottleneck(
    y: Tensor, x: Tensor, down: Layer, up: Layer, activation: str, factor: float = 1.0, dropout: float = 0.0
) -> Tensor:
    """Return y + factor up(dropout(activation(down(x)))), in the type of ``y``.

    Each row of ``x`` (rows, tokens, features) can have separate layers: (rows, out, in) and (rows, 1, out).
    """
    hidden = ACTIVATIONS[activation](_apply(x, *down))
    change = _apply(F.dropout(hidden, dropout) if dropout > 0 else hidden, *up)
    return torch.add(y, in_type(change, y.dtype), alpha=factor)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, bias = in_type(weight, x.dtype), None if bias is None else in_type(bias, x.dtype)
    if bias is not None and weight.dim() == 3:
        return torch.baddbmm(bias, x, weight.mT)
    return F.linear(x, weight, bias)


def output_of(host: nn.Module, name: str) -> tuple[int, Tensor]:
    """Return the number of features that a module returns, and their weight, from the last linear layer in it.

    Raises:
        ValueError: The module contains no linear layer.
    """
    modules = [host, *base_modules(host).values()]
    linear = [m for m in modules if isinstance(m, nn.Linear) or is_called_linear(m) or _is_read(m)]
    if not linear:
        raise ValueError(f"{name} ({type(host).__name__}) holds no linear layer, which would tell its width.")
    last = linear[-1]
    if isinstance(last, nn.Linear):  # whatever a subclass does with its features
        return last.out_features, last.weight
    layer = layer_of(last)
    return layer.shape(last)[0], layer.parameter(last)


def _is_read(module: nn.Module) -> bool:
    return read_weight_attribute(type(module)) == "weight"
