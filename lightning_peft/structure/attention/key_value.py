"""``KeyValue``: key and value projections of an attention module, for all methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.torch_api import has_hooks
from ..fused_rows import fused_rows, is_fused
from ..layer_of import layer_of
from ..roles import ROLES
from ..rows import Rows
from ..structure_of import structure_of
from ..transformers_api import attention_heads


@dataclass(frozen=True)
class KeyValue:
    """Key and value projections of an attention module.

    Args:
        key: Name, below the module, of the layer that computes keys; empty for ``nn.MultiheadAttention``, which holds
            both.
        value: Name of the layer that computes values.
        key_rows: Rows of the keys in the weight of a layer that computes more; None for all.
        value_rows: Rows of the values.
    """

    key: str
    value: str
    key_rows: Rows | None = None
    value_rows: Rows | None = None

    def __call__(self, host: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project x (tokens, features) to keys and values (tokens, heads * size), adapters included."""
        child: Any = host.get_submodule(self.key)
        if isinstance(child, nn.MultiheadAttention):
            return _projected_by_torch(child, x)
        if child.weight.is_floating_point():
            x = x.to(child.weight.dtype)
        keys = child(x)
        values = keys if self.key == self.value else host.get_submodule(self.value)(x)
        return _features(keys, self.key_rows), _features(values, self.value_rows)

    def plain_tensors(self, host: nn.Module) -> list[Tensor] | None:
        """Return all tensors that the projections are computed with; None where a call does more than two products."""
        if not self.key or self.key_rows is not None or self.value_rows is not None:
            return None
        layers: list[Any] = [host.get_submodule(self.key), host.get_submodule(self.value)]
        if any(type(layer) is not nn.Linear or has_hooks(layer) for layer in layers):
            return None
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]

    def weight(self, host: nn.Module) -> Tensor:
        """Return the weight of a projection, for its device and type."""
        child: Any = host.get_submodule(self.key)
        return next(child.parameters()) if isinstance(child, nn.MultiheadAttention) else child.weight

    def inputs(self, host: nn.Module) -> tuple[int, int]:
        """Return the numbers of input features of keys and of values."""
        child: Any = host.get_submodule(self.key)
        if isinstance(child, nn.MultiheadAttention):
            return child.kdim, child.vdim
        value = host.get_submodule(self.value)
        return layer_of(child).shape(child)[1], layer_of(value).shape(value)[1]

    def outputs(self, host: nn.Module) -> tuple[int, int]:
        """Return the widths of keys and values, all their heads together."""
        child: Any = host.get_submodule(self.key)
        if isinstance(child, nn.MultiheadAttention):
            return child.embed_dim, child.embed_dim
        value = host.get_submodule(self.value)
        return layer_of(child).shape(child, self.key_rows)[0], layer_of(value).shape(value, self.value_rows)[0]


def _features(x: Tensor, rows: Rows | None) -> Tensor:
    """Return the features of x (tokens, features) that rows of a weight computed."""
    return x if rows is None else rows.features(x)


def _projected_by_torch(host: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    packed = host.in_proj_weight  # read once, since adapters compute it at each access
    weights = (host.k_proj_weight, host.v_proj_weight) if packed is None else packed[host.embed_dim :].chunk(2)
    biases = (None, None) if host.in_proj_bias is None else host.in_proj_bias[host.embed_dim :].chunk(2)
    key, value = (F.linear(x.to(w.dtype), w, b) for w, b in zip(weights, biases, strict=True))
    return key, value


def key_value(model: nn.Module, name: str) -> KeyValue:
    """Return the key and value projections of an attention module.

    Raises:
        TypeError: The module has no such children; the message says which names are known.
    """
    host = model.get_submodule(name)
    if isinstance(host, nn.MultiheadAttention):
        return KeyValue("", "")
    (key, key_rows), (value, value_rows) = (_projection(model, name, part) for part in ("key", "value"))
    return KeyValue(key, value, key_rows, value_rows)


def _projection(model: nn.Module, name: str, part: str) -> tuple[str, Rows | None]:
    """Return the name of the layer below an attention module that computes keys or values, and their rows in it."""
    prefix = f"{name}." if name else ""
    layers = [layer for layer in ROLES[f"attention.{part}"](model) if layer.startswith(prefix)]
    if len(layers) != 1:
        found = f"{len(layers)} layers ({', '.join(layers)})" if layers else "no known layer"
        raise TypeError(
            f"{name} ({type(model.get_submodule(name)).__name__}) has {found} that computes its {part}s, where one is "
            f"expected (such as k_proj and v_proj, key and value, c_attn). Target the module that holds it, or choose "
            f"another method."
        )
    host = model.get_submodule(layers[0])
    rows = fused_rows(host, layers[0]) if is_fused(layers[0], host) else []
    return layers[0].removeprefix(prefix), next((found for found in rows if found.part == part), None)


def head_count(model: nn.Module, name: str) -> int:
    """Return the number of query heads of an attention module, as measured or as it or its configuration says.

    Raises:
        TypeError: Nothing tells the number of heads.
    """
    host = model.get_submodule(name)
    count = structure_of(model).heads.get(name) or attention_heads(host)
    if count is None:
        raise TypeError(
            f"{name} ({type(host).__name__}) does not say how many heads it has; give the method heads=...."
        )
    return count
