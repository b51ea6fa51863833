"""``WeightUpdate``: adapters that train another weight for a linear layer, on any layer type and any of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.fused_linear import WeightUpdateSpec, rebuilding_is_cheaper, updated_linear, updated_weight
from ..structure.fused_rows import Rows
from ..structure.layer_types import layer_of
from .adapter import Adapter, Call, InnerCall
from .per_row import BatchableLayerAdapter
from .weight_cache import WeightCache


class WeightUpdate(BatchableLayerAdapter, Adapter):
    """Trains W' instead of the weight W of a linear layer: y = host(x) + x (W' - W)^T, or x W'^T at once where cheaper.

    A subclass defines ``delta()``, for W' = W + delta(), or ``updated(weight)``, for any W'. Everything else follows:
    embeddings, convolutions, quantized layers, rows of fused layers, torch's attention, merging and files. ``update``,
    ``as_parametrization`` and ``factor_tensors`` may say how the same is computed faster:
    ``update(host, x) == layer.apply(host, x, updated(w) - w)`` with the rows ``w`` of the weight.

    Args:
        host: Layer whose weight, seen as (out, in, *kernel), is updated.
        rows: Rows of a fused layer that are updated, as ``select`` returned them; None for all.

    Raises:
        TypeError: The subclass defines neither ``delta`` nor ``updated``, or the layer's type is not known.
    """

    rows: tuple[int, int]

    def __init__(self, host: nn.Module, rows: Rows | None = None) -> None:
        super().__init__()
        cls = type(self)
        if cls.delta is WeightUpdate.delta and cls.updated is WeightUpdate.updated:
            raise TypeError(f"{cls.__name__} must define delta() or updated(weight).")
        self.layer = layer_of(host)
        self.weight_cache: WeightCache | None = None  # in evaluation on the CPU alone
        out, *rest = self.layer.shape(host)
        self.part, *ends = rows or ("", 0, out)
        self.rows = (ends[0], ends[1])
        self.shape = (ends[1] - ends[0], *rest)  # of the rows, and so of delta()
        self.exclusive = cls.updated is not WeightUpdate.updated  # W' need not be a sum in which updates commute

    def delta(self) -> Tensor:
        """Return W' - W of the rows, as (out, in, *kernel)."""
        raise TypeError(f"The update of {type(self).__name__} depends on the weight; call updated(weight).")

    def updated(self, weight: Tensor) -> Tensor:
        """Return W' for rows W of a weight, as (out, in, *kernel)."""
        return weight + self.delta()

    def update(self, host: Any, x: Tensor) -> Tensor:
        """Return the difference that the update makes to the output of the rows; the bias is no part of it."""
        if type(self).updated is WeightUpdate.updated:
            change = self.delta()
        else:
            weight = self._read_rows(host)
            change = self.updated(weight) - weight
        return self.layer.apply(host, x, change.to(x.dtype) if x.is_floating_point() else change)

    def as_parametrization(self) -> WeightUpdateSpec | None:
        """Return (parametrization, rows, factors) for one product with the updated weight; None to use ``update``."""
        return None

    def factor_tensors(self) -> Sequence[Tensor]:
        """Return the tensors on which the update depends."""
        return [*self.parameters(), *self.buffers()]

    def train(self, mode: bool = True) -> WeightUpdate:
        if mode:
            self.invalidate_cache()
        return super().train(mode)

    def invalidate_cache(self) -> None:
        self.weight_cache = None

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        if self.layer.weight_read_by_parent:
            return inner(*args, **kwargs)  # the host reads its weight, a property that returns the updated one
        return self._forward(host, inner, *args, **kwargs)

    def _forward(self, host: Any, inner: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (product := self._fused_forward(host, inner, x)) is not None:
            return product
        return self.post_forward(host, x, inner(x, *args, **kwargs))

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        return y + self.pad_to_host_output(host, self.update(host, x)).to(y.dtype)

    def pad_to_host_output(self, host: Any, update: Tensor) -> Tensor:
        """Pad the output of the rows with zeros to the width of the host's output."""
        start, stop = self.rows
        return F.pad(update, (start, self.layer.shape(host)[0] - stop)) if self.part else update

    def _fused_forward(self, host: Any, inner: Call, x: Tensor) -> Tensor | None:
        """Return the output of the host with this adapter and the remaining ones; None unless one product is cheaper.

        That needs a host whose forward is a plain product, weight updates only, and a frozen base weight.
        """
        if not isinstance(inner, InnerCall) or not self.layer.is_plain_matmul(host, inner.forward):
            return None
        adapters = [*inner.adapters, self]
        if not all(isinstance(adapter, WeightUpdate) for adapter in adapters):
            return None
        if torch.is_grad_enabled() and host.weight.requires_grad:
            return None
        if not (torch.is_grad_enabled() or self.training or torch.compiler.is_compiling()) and host.weight.is_cpu:
            return self._cached_forward(host, adapters, x)
        updates = self._parametrizations(host, adapters)
        if updates and rebuilding_is_cheaper(updates, x, self.layer.read(host)):
            return updated_linear(x, self.layer.read(host), host.bias, updates)
        return None

    def _parametrizations(self, host: Any, adapters: Sequence[Any]) -> list[WeightUpdateSpec]:
        """Return the parametrizations of all these adapters, inner before outer; an empty list if one has none."""
        # In 16 bits, a weight would round small updates away; so would factors that sharding has cast down with it.
        if host.weight.dtype not in (torch.float32, torch.float64):
            return []
        updates: list[WeightUpdateSpec] = []
        for adapter in adapters:
            update = adapter.as_parametrization()
            if update is None or any(factor.dtype != host.weight.dtype for factor in update.factors):
                return []
            updates.append(update)
        return updates

    def _cached_forward(self, host: Any, adapters: Sequence[Any], x: Tensor) -> Tensor | None:
        factors = [factor for adapter in adapters for factor in adapter.factor_tensors()]
        cache = self.weight_cache = self.weight_cache or WeightCache()
        weight = cache.get(host.weight, factors)
        if weight is None:
            if not (updates := self._parametrizations(host, adapters)):
                return None
            weight = updated_weight(self.layer.read(host), updates)
            cache.set(host.weight, factors, weight)
            if cache.weight is None and not rebuilding_is_cheaper(updates, x, weight):
                return None
        return F.linear(x, weight, host.bias)

    def effective_weight(self, weight: Tensor) -> Tensor:
        start, stop = self.rows
        return torch.cat([weight[:start], self.updated(weight[start:stop]).to(weight.dtype), weight[stop:]])

    def merge(self, host: Any) -> None:
        self.layer.write(host, self.updated(self._read_rows(host)).detach(), self.rows[0])

    def _read_rows(self, host: Any) -> Tensor:
        """Return the rows W of the weight of a host, in float32 or wider."""
        weight = self.layer.read(host)[slice(*self.rows)]
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
