"""``layer_of``: the ``LayerType`` of a layer, by its class and by what the class was measured to compute.

Add a layer by ``layer_of.register(Layer)(lambda host: ItsType())``.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .expert_layers import expert_weights
from .layer_probe import output_scale
from .layer_types import (
    ConvType,
    EmbeddingType,
    LayerType,
    LinearType,
    ReadLinearType,
    ScaledEmbeddingType,
    TransposedLinearType,
)
from .transformers_api import CONV1D


class UnknownLayerError(TypeError):
    """Says that a module is no layer of a known type.

    Args:
        host: The module.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__(
            f"{type(host).__name__} is no known linear layer (nn.Linear, nn.Conv1d/2d/3d, nn.Embedding, transformers' "
            f"Conv1D). Choose other targets, or teach it with lightning_peft.core.layer_of.register."
        )
        self.host = host


@functools.singledispatch
def layer_of(host: nn.Module) -> LayerType:
    """Return the ``LayerType`` of a layer; raise a ``TypeError`` if the layer is of no known type.

    Examples:
        >>> from lightning_peft.core import layer_of
        >>> convolution = nn.Conv1d(4, 8, kernel_size=3)
        >>> tuple(layer_of(convolution).shape(convolution))  # (out, in, *kernel)
        (8, 4, 3)
    """
    if (layer_type := _foreign(host)) is not None:
        return layer_type
    if expert_weights(host):
        raise TypeError(
            f"{type(host).__name__} holds the weights of experts, 3-D parameters that LoRA without decompose adapts "
            f"and this method does not. Choose other targets, or use LoRA."
        )
    raise UnknownLayerError(host)


_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR, _READ, _EMBEDDING, _CONV = LinearType(), ReadLinearType(), EmbeddingType(), ConvType()
FOREIGN: dict[str, LayerType] = {CONV1D: TransposedLinearType()}  # by class name of the layer, or of its weight


def _foreign(host: nn.Module) -> LayerType | None:
    """Return the type of another library's layer, known by the class of the layer or of its weight."""
    classes: Any = type(host), type(host._parameters.get("weight"))
    return _foreign_by_class(*classes)


@functools.cache
def _foreign_by_class(*classes: Any) -> LayerType | None:
    found = (FOREIGN.get(f"{cls.__module__}.{cls.__qualname__}") for leaf in classes for cls in leaf.__mro__)
    return next(filter(None, found), None)


@layer_of.register
def _linear(host: nn.Linear) -> LayerType:
    if (layer_type := _foreign(host)) is None:
        output_scale(host, nn.Linear, _LINEAR)
    return layer_type or _LINEAR


@layer_of.register
def _embedding(host: nn.Embedding) -> LayerType:
    scale = output_scale(host, nn.Embedding, _EMBEDDING)
    return _EMBEDDING if scale == 1 else ScaledEmbeddingType(scale)


@layer_of.register(nn.Conv1d)
@layer_of.register(nn.Conv2d)
@layer_of.register(nn.Conv3d)
def _conv(host: Any) -> LayerType:
    output_scale(host, next(base for base in _CONVOLUTIONS if isinstance(host, base)), _CONV)
    return _CONV


for _read in (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear):
    layer_of.register(_read)(lambda host: _READ)


def is_called_linear(module: nn.Module) -> bool:
    """Return whether a call of the module maps features linearly, unlike embeddings and torch's ``out_proj``."""
    try:
        return layer_of(module).maps_features
    except TypeError:
        return False
