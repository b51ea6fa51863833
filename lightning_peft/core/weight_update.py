"""``WeightUpdate``: adapters that train another weight, or bias, for a linear layer, of any type and for any rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autograd_function import is_traced, records_gradients
from ..ops.fused_linear import WeightUpdateSpec, rebuilding_is_cheaper, updated_linear, updated_weight
from ..structure.layer_of import layer_of
from ..structure.rows import Rows
from .adapter import Adapter, Call, InnerCall
from .per_row import BatchableLayerAdapter
from .weight_cache import WeightCache


class WeightUpdate(BatchableLayerAdapter, Adapter):
    """Trains W' instead of the weight W of a linear layer: y = host(x) + x (W' - W)^T, or x W'^T at once where cheaper.

    A subclass defines ``delta()``, for W' = W + delta(), or ``updated(weight)``, for any W'; besides them, or alone,
    ``updated_bias(bias)`` for another bias. Everything else follows: embeddings, convolutions, quantized layers, rows
    of fused layers, torch's attention, merging and files. ``update``, ``as_parametrization`` and ``factor_tensors`` may
    say how the same is computed faster: ``update(host, x) == layer.apply(host, x, updated(w) - w)`` with the rows ``w``
    of the weight.

    Args:
        host: Layer whose weight, seen as (out, in, *kernel), is updated.
        rows: Rows of a fused layer that are updated, as ``select`` returned them; None for all.

    Raises:
        TypeError: The subclass defines none of ``delta``, ``updated`` and ``updated_bias``, or the layer's type is not
            known.
    """

    rows: Rows

    def __init__(self, host: nn.Module, rows: Rows | None = None) -> None:
        super().__init__()
        cls = type(self)
        self.updates_bias = cls.updated_bias is not WeightUpdate.updated_bias
        self.updates_weight = cls.delta is not WeightUpdate.delta or cls.updated is not WeightUpdate.updated
        if not (self.updates_bias or self.updates_weight):
            raise TypeError(f"{cls.__name__} must define delta(), updated(weight) or updated_bias(bias).")
        self.layer = layer_of(host)
        self.weight_cache: WeightCache | None = None  # in evaluation on the CPU alone
        out, *rest = self.layer.shape(host)
        self.rows = rows or Rows("", 0, out)
        self.part = self.rows.part
        self.host_rows = out
        self.shape = (self.rows.size, *rest)  # of the rows, and so of delta()
        # W' and b' need not be sums, in which updates commute.
        self.exclusive = cls.updated is not WeightUpdate.updated or self.updates_bias

    def delta(self) -> Tensor:
        """Return W' - W of the rows, as (out, in, *kernel)."""
        raise TypeError(f"The update of {type(self).__name__} depends on the weight; call updated(weight).")

    def updated(self, weight: Tensor) -> Tensor:
        """Return W' for rows W of a weight, as (out, in, *kernel)."""
        return weight + self.delta()

    def updated_bias(self, bias: Tensor | None) -> Tensor:
        """Return b' for the bias b of the rows, of shape (out,); b is None where the layer has none."""
        raise TypeError(f"{type(self).__name__} does not change the bias.")

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
        y = inner(x, *args, **kwargs)
        y = self.post_forward(host, x, y) if self.updates_weight else y
        return y + self._bias_change(host).to(y.dtype) if self.updates_bias else y

    def _bias_change(self, host: Any) -> Tensor:
        bias = self.layer.bias(host)
        updated = self._whole_bias(bias)
        change = updated if bias is None else updated - bias
        return change.view(-1, *[1] * (len(self.shape) - 2))  # features, and the dimensions of a kernel behind them

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        return (y + self.pad_to_host_output(host, self.update(host, x))).to(y.dtype)

    def pad_to_host_output(self, host: Any, update: Tensor) -> Tensor:
        """Pad the output of the rows with zeros to the width of the host's output."""
        return self.rows.pad(update, self.host_rows)

    def _fused_forward(self, host: Any, inner: Call, x: Tensor) -> Tensor | None:
        """Return the output of the host with this adapter and the remaining ones; None unless one product is cheaper.

        That needs a host whose forward is a plain product, weight updates only, and a frozen base weight.
        """
        if not isinstance(inner, InnerCall) or not self.layer.is_plain_matmul(host, inner.forward):
            return None
        adapters = [*inner.adapters, self]
        if not all(isinstance(adapter, WeightUpdate) for adapter in adapters):
            return None
        if records_gradients() and host.weight.requires_grad:
            return None
        if self._may_cache() and host.weight.is_cpu:
            return self._cached_forward(host, adapters, x)
        updates = self._parametrizations(host, adapters)
        if updates and rebuilding_is_cheaper(updates, x, self.layer.read(host)):
            return updated_linear(x, self.layer.read(host), host.bias, updates)
        return None

    def _may_cache(self) -> bool:
        """Return whether an updated weight can be kept for later calls; compiled or traced code would bake it in."""
        written_down = torch.compiler.is_compiling() or is_traced()
        return not (torch.is_grad_enabled() or self.training or written_down)

    def _parametrizations(self, host: Any, adapters: Sequence[Any]) -> list[WeightUpdateSpec]:
        """Return the parametrizations of all these adapters, inner before outer; an empty list if one has none."""
        # In 16 bits, a weight would round small updates away; so would factors that sharding has cast down with it.
        if host.weight.dtype not in (torch.float32, torch.float64):
            return []
        updates: list[WeightUpdateSpec] = []
        for adapter in adapters:
            special = adapter.updates_bias or adapter.rows.repeats > 1
            update = None if special else adapter.as_parametrization()
            if update is None or any(factor.dtype != host.weight.dtype for factor in update.factors):
                return []
            updates.append(update)
        return updates

    def _cached_forward(self, host: Any, adapters: Sequence[Any], x: Tensor) -> Tensor | None:
        cache = self.weight_cache = self.weight_cache or WeightCache()
        base = self.layer.read(host)
        if cache.products_are_small and not rebuilding_is_cheaper((), x, base):
            return None  # to notice changes of the weight would cost more than adding small products
        factors = [factor for adapter in adapters for factor in adapter.factor_tensors()]
        weight = cache.get(host.weight, adapters, factors)
        if weight is None:
            if not (updates := self._parametrizations(host, adapters)):
                return None
            cache.products_are_small = not any(update.form.rebuilds_full_weight for update in updates)
            if not rebuilding_is_cheaper(updates, x, base):
                return None
            weight = updated_weight(base, updates)
            cache.set(host.weight, adapters, factors, weight)
        return F.linear(x, weight, host.bias)

    def effective_weight(self, weight: Tensor) -> Tensor:
        if not self.updates_weight:
            return weight
        return self.rows.put(weight, self.updated(self.rows.take(weight)).to(weight.dtype))

    def effective_bias(self, bias: Tensor | None) -> Tensor | None:
        return self._whole_bias(bias) if self.updates_bias else bias

    def _whole_bias(self, bias: Tensor | None) -> Tensor:
        """Return the host's bias with that of the rows updated."""
        if bias is None:
            return self.rows.pad(self.updated_bias(None), self.host_rows)
        return self.rows.put(bias, self.updated_bias(self.rows.take(bias)).to(bias.dtype))

    @torch.no_grad()
    def merge(self, host: Any) -> None:
        if self.updates_bias:
            self.layer.write_bias(host, self._whole_bias(self.layer.bias(host)))  # first, since it may refuse
        if self.updates_weight:
            for first, rows in self.rows.split(self.updated(self._read_rows(host))):
                self.layer.write(host, rows, first)

    def _read_rows(self, host: Any) -> Tensor:
        """Return the rows W of the weight of a host, in float32 or wider."""
        weight = self.rows.take(self.layer.read(host))
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
