"""``LayerType`` and ``layer_of``: how each type of linear layer is applied, and its weight read and written.

Every weight is seen in one layout, ``(out, in, *kernel)``, whatever the layer stores. Other libraries' layers join with
``layer_of.register(TheirLayer)(lambda host: TheirType())``.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.sharded_tensors import global_shape
from .transformers_api import CONV1D


class LayerType(ABC):
    """What is known about one type of linear layer; holds no state, the host is passed in."""

    is_embedding = False  # inputs are indices, not features
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
        bias: nn.Parameter | None = host._parameters.get("bias")
        return bias

    def read(self, host: Any) -> Tensor:
        """Return the host's weight as (out, in, *kernel), a view where possible."""
        return self.parameter(host)

    def full_shape(self, host: Any) -> torch.Size:
        """Return (out, in, *kernel) of the whole weight, sharded or not."""
        return global_shape(self.read(host))

    def shape(self, host: Any, rows: tuple[Any, int, int] | None = None) -> torch.Size:
        """Return (out, in, *kernel) of the weight, or of some of its rows: (part, start, stop)."""
        shape = self.full_shape(host)
        return shape if rows is None else torch.Size([rows[2] - rows[1], *shape[1:]])

    @torch.no_grad()
    def write(self, host: Any, rows: Tensor, first: int = 0) -> None:
        """Replace rows of the host's weight by ``rows`` of shape (any, in, *kernel), rounding once."""
        self.read(host)[first : first + len(rows)].copy_(rows)

    def is_plain_matmul(self, host: Any, call: object) -> bool:
        """Whether ``call``, what the host would run, is exactly the product with its weight and its bias."""
        return False

    def factorizes(self, host: Any) -> bool:
        """Whether ``apply`` with B A equals ``apply_pointwise`` with B after ``apply`` with A."""
        return True


class LinearType(LayerType):
    """``nn.Linear``: y = x W^T."""

    maps_features = True

    def is_plain_matmul(self, host: Any, call: object) -> bool:
        return call is nn.Linear.forward and type(host.weight) in _PLAIN

    def apply(self, host: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def apply_pointwise(self, host: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)


class _StoredTransposedType(LayerType):
    """A layer that stores W^T."""

    def read(self, host: Any) -> Tensor:
        return self.parameter(host).T

    def full_shape(self, host: Any) -> torch.Size:
        return global_shape(self.parameter(host))[::-1]


class TransposedLinearType(_StoredTransposedType, LinearType):
    """``Conv1D`` of GPT-2."""

    def is_plain_matmul(self, host: Any, call: object) -> bool:
        return getattr(call, "__qualname__", "") == "Conv1D.forward" and type(host.weight) in _PLAIN


class ReadLinearType(LinearType):
    """A weight that torch's attention reads from a module without calling it."""

    weight_read_by_parent, maps_features = True, False

    def is_plain_matmul(self, host: Any, call: object) -> bool:
        return False

    def bias(self, host: Any) -> nn.Parameter | None:
        bias: nn.Parameter | None = host._parameters[read_bias_attribute(type(host))]
        return bias

    def parameter(self, host: Any) -> Tensor:
        name = read_weight_attribute(type(host)) or "weight"
        weight: Tensor | None = host._parameters[name]  # the attribute itself gives the updated one
        if weight is None:
            raise TypeError("This nn.MultiheadAttention has separate projections (kdim, vdim); they cannot be adapted.")
        return weight


class EmbeddingType(_StoredTransposedType):
    """``nn.Embedding``: the linear map of one-hot vectors, stored as W^T."""

    is_embedding = True

    def apply(self, host: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight.T, host.padding_idx)

    def apply_pointwise(self, host: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)


class ConvType(LayerType):
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``."""

    def apply(self, host: Any, x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = host._conv_forward(x, weight, None)  # knows the padding modes
        return result

    def apply_pointwise(self, host: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        pointwise = (F.conv1d, F.conv2d, F.conv3d)[host.weight.dim() - 3]
        return pointwise(hidden, weight.reshape(*weight.shape, *[1] * (host.weight.dim() - 2)))

    def factorizes(self, host: Any) -> bool:
        return bool(host.groups == 1)


@functools.singledispatch
def layer_of(host: nn.Module) -> LayerType:
    """Return what is known about a layer's type; a ``TypeError`` where nothing is."""
    if (layer := _foreign(host)) is not None:
        return layer
    raise TypeError(
        f"{type(host).__name__} is no known linear layer (nn.Linear, nn.Conv1d/2d/3d, nn.Embedding, transformers' "
        f"Conv1D). Choose other targets, or teach it with lightning_peft.core.layer_of.register."
    )


_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # not sharded, not quantized; the last is a plain one's shape
_LINEAR, _READ, _EMBEDDING, _CONV = LinearType(), ReadLinearType(), EmbeddingType(), ConvType()
# Classes of layers, or of their weights, by name, so that nothing is imported.
FOREIGN: dict[str, LayerType] = {CONV1D: TransposedLinearType()}


def _foreign(host: nn.Module) -> LayerType | None:
    kinds: Any = type(host), type(host._parameters.get("weight"))
    return _foreign_by_type(*kinds)


@functools.cache
def _foreign_by_type(*kinds: Any) -> LayerType | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for kind in kinds for cls in kind.__mro__)
    return next((FOREIGN[name] for name in names if name in FOREIGN), None)


@layer_of.register
def _(host: nn.Linear) -> LayerType:
    return _foreign(host) or _LINEAR


@layer_of.register(nn.MultiheadAttention)
@layer_of.register(nn.modules.linear.NonDynamicallyQuantizableLinear)
def _(host: nn.Module) -> LayerType:
    return _READ


@layer_of.register
def _(host: nn.Embedding) -> LayerType:
    return _EMBEDDING


@layer_of.register(nn.Conv1d)
@layer_of.register(nn.Conv2d)
@layer_of.register(nn.Conv3d)
def _(host: nn.Module) -> LayerType:
    return _CONV


def has_values(x: Tensor) -> bool:
    """Whether a tensor is more than a shape, which is all it is on the meta device and in a plan."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def is_called_linear(module: nn.Module) -> bool:
    """Whether a module maps features linearly when called: not embeddings, not torch's ``out_proj``, which is read."""
    try:
        return layer_of(module).maps_features
    except TypeError:
        return False


def read_weight_attribute(kind: type[nn.Module]) -> str | None:
    """Return the name of the weight that torch's attention reads from modules of this type without calling them."""
    if issubclass(kind, nn.MultiheadAttention):
        return "in_proj_weight"
    return "weight" if issubclass(kind, nn.modules.linear.NonDynamicallyQuantizableLinear) else None


def read_bias_attribute(kind: type[nn.Module]) -> str:
    """Return the name of the bias that belongs to that weight."""
    return (read_weight_attribute(kind) or "weight").replace("weight", "bias")
