"""``LayerType``: how each type of linear layer is applied, and how its weight and bias are stored.

Every weight is seen as ``(out, in, *kernel)``. ``layer_of`` returns the type of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.sharded_tensors import global_shape
from .read_weights import read_bias_attribute, read_weight_attribute
from .rows import Rows

_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # types of weights that are neither sharded nor quantized


class LayerType(ABC):
    """Knowledge about one type of linear layer. It holds no state; the host, a layer of that type, is passed in.

    Examples:
        >>> from lightning_peft.core import layer_of
        >>> layer = nn.Embedding(10, 4)
        >>> tuple(layer_of(layer).shape(layer)), layer_of(layer).is_embedding  # (out, in): features, tokens
        ((4, 10), True)
    """

    is_embedding = False  # its inputs are indices, not features
    weight_read_by_parent = False  # a module further out reads the weight and never calls the layer
    maps_features = False  # a call maps the last dimension of its input linearly

    @abstractmethod
    def apply(self, host: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the host's linear map with another ``weight`` of shape (any, in, *kernel) and no bias."""

    @abstractmethod
    def apply_pointwise(self, host: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """Map the features of an output of ``apply`` with ``weight`` of shape (any, features)."""

    def parameter(self, host: Any) -> Tensor:
        """Return the weight as the host stores it."""
        weight: Tensor = host.weight
        return weight

    def bias(self, host: Any) -> nn.Parameter | None:
        """Return the bias of the host itself."""
        return cast("nn.Parameter | None", host._parameters.get("bias"))

    def read(self, host: Any) -> Tensor:
        """Return the host's weight as (out, in, *kernel), a view where possible."""
        return self.parameter(host)

    def full_shape(self, host: Any) -> torch.Size:
        """Return (out, in, *kernel) of the whole weight, even where each process holds a shard of it."""
        return global_shape(self.read(host))

    def shape(self, host: Any, rows: Rows | None = None) -> torch.Size:
        """Return (out, in, *kernel) of the weight, or of some of its rows."""
        shape = self.full_shape(host)
        return shape if rows is None else torch.Size([rows.size, *shape[1:]])

    @torch.no_grad()
    def write(self, host: Any, rows: Tensor, first: int = 0) -> None:
        """Replace rows of the host's weight by ``rows`` of shape (any, in, *kernel), rounding once."""
        weight = self.read(host)
        if type(weight) is Tensor and weight._base is None and not weight.is_inference():  # computed, and no view
            raise TypeError(f"The weight of {type(host).__name__} is computed; its layer type has to override write.")
        weight[first : first + len(rows)].copy_(rows)

    @torch.no_grad()
    def write_bias(self, host: Any, bias: Tensor) -> None:
        """Replace the host's bias by ``bias`` of shape (out,), rounding once; a host without a bias gets one.

        Raises a ``TypeError`` if the host's class has no bias.
        """
        if (name := read_bias_attribute(type(host))) not in host._parameters:
            raise TypeError(f"{type(host).__name__} has no place for a bias; keep the adapter, or merge without it.")
        if (own := self.bias(host)) is None:
            values = bias.detach().to(self.parameter(host).dtype, copy=True)
            setattr(host, name, nn.Parameter(values, requires_grad=False))
        else:
            own.copy_(bias)

    def is_plain_matmul(self, host: Any, call: object) -> bool:
        """Return whether ``call``, the host's forward, computes x W^T + bias and nothing else."""
        return False

    def factorizes(self, host: Any) -> bool:
        """Return whether ``apply`` with B A equals ``apply_pointwise`` with B after ``apply`` with A."""
        return True


class LinearType(LayerType):
    """``nn.Linear``: y = x W^T.

    Examples:
        >>> from lightning_peft.core import LinearType
        >>> layer, x = nn.Linear(4, 8), torch.ones(2, 4)
        >>> LinearType().apply(layer, x, torch.ones(3, 4))[0]  # with another weight, without a bias
        tensor([4., 4., 4.])
    """

    maps_features = True

    def is_plain_matmul(self, host: Any, call: object) -> bool:
        return call is nn.Linear.forward and type(host.weight) in _PLAIN

    def apply(self, host: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def apply_pointwise(self, host: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)


class _StoredTransposedType(LayerType):
    """Base class for layers that store W^T."""

    def read(self, host: Any) -> Tensor:
        return self.parameter(host).T

    def full_shape(self, host: Any) -> torch.Size:
        return global_shape(self.parameter(host))[::-1]


class TransposedLinearType(_StoredTransposedType, LinearType):
    """``Conv1D`` of GPT-2: y = x W^T, with W^T stored."""

    def is_plain_matmul(self, host: Any, call: object) -> bool:
        return getattr(call, "__qualname__", "") == "Conv1D.forward" and type(host.weight) in _PLAIN


class ReadLinearType(LinearType):
    """``in_proj_weight`` of torch's attention, and ``out_proj``, whose weight it reads without calling the layer."""

    weight_read_by_parent, maps_features = True, False

    def bias(self, host: Any) -> nn.Parameter | None:
        return cast("nn.Parameter | None", host._parameters[read_bias_attribute(type(host))])

    def parameter(self, host: Any) -> Tensor:
        if (weight := host._parameters[read_weight_attribute(type(host)) or "weight"]) is None:  # not the property
            raise TypeError("This nn.MultiheadAttention has separate projections (kdim, vdim); they cannot be adapted.")
        return cast(Tensor, weight)


class EmbeddingType(_StoredTransposedType):
    """``nn.Embedding``: the linear map of one-hot vectors, stored as W^T."""

    is_embedding = True
    apply_pointwise = LinearType.apply_pointwise

    def apply(self, host: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight.T, host.padding_idx)


class ScaledEmbeddingType(EmbeddingType):
    """An ``nn.Embedding`` whose output is multiplied by a number, as in Gemma 3 and BART."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def apply(self, host: Any, x: Tensor, weight: Tensor) -> Tensor:
        return super().apply(host, x, weight) * self.scale


class ConvType(LayerType):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, with a weight (out, in / groups, *kernel)."""

    def apply(self, host: Any, x: Tensor, weight: Tensor) -> Tensor:
        return cast(Tensor, host._conv_forward(x, weight, None))  # the host's own method knows its padding mode

    def apply_pointwise(self, host: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        pointwise = (F.conv1d, F.conv2d, F.conv3d)[host.weight.dim() - 3]
        return pointwise(hidden, weight.reshape(*weight.shape, *[1] * (host.weight.dim() - 2)))

    def factorizes(self, host: Any) -> bool:
        return bool(host.groups == 1)
