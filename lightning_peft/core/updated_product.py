"""``updated_product``: the output of a layer by one product with its updated weight, where that is cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.autograd_function import records_gradients
from ..ops.fused_linear import WeightUpdateSpec, rebuilding_is_cheaper, updated_linear, updated_weight
from ..ops.torch_api import is_recorded
from .weight_cache import WeightCache


def updated_product(host: Any, adapters: Sequence[Any], x: Tensor) -> Tensor | None:
    """Return the output of a host whose forward is a plain product, with updates of its weight.

    Args:
        host: The layer.
        adapters: Weight updates, inner before outer; the last one keeps the weight in evaluation on the CPU.
        x: Input of the layer.

    Returns:
        The output; None where the updates have to be added to the output, or cost less there.
    """
    weight = host.weight
    if records_gradients() and weight.requires_grad:
        return None
    base = adapters[-1].layer.read(host)
    if weight.is_cpu and may_cache(adapters[-1]):
        return _cached_product(host, adapters, x, base)
    updates = _parametrizations(weight, adapters)
    if updates and rebuilding_is_cheaper(updates, x, base):
        return updated_linear(x, base, host.bias, updates)
    return None


def may_cache(adapter: Any) -> bool:
    """Return whether an updated weight can be kept for later calls; compiled or traced code would bake it in."""
    if adapter.training or torch.is_grad_enabled():
        return False
    return not is_recorded()


def _parametrizations(weight: Tensor, adapters: Sequence[Any]) -> list[WeightUpdateSpec]:
    """Return the parametrizations of all these adapters, inner before outer; an empty list if one has none."""
    # In 16 bits, a weight would round small updates away; so would factors that sharding has cast down with it.
    if weight.dtype not in (torch.float32, torch.float64):
        return []
    updates: list[WeightUpdateSpec] = []
    for adapter in adapters:
        special = adapter.updates_bias or adapter.rows.repeats > 1
        update = None if special else adapter.as_parametrization()
        if update is None or any(factor.dtype != weight.dtype for factor in update.factors):
            return []
        updates.append(update)
    return updates


def _cached_product(host: Any, adapters: Sequence[Any], x: Tensor, base: Tensor) -> Tensor | None:
    keeper, stored = adapters[-1], host.weight
    cache = keeper.weight_cache = keeper.weight_cache or WeightCache()
    if cache.products_are_small and not rebuilding_is_cheaper((), x, base):
        return None  # to notice changes of the weight would cost more than adding small products
    factors = [factor for adapter in adapters for factor in adapter.factor_tensors()]
    weight = cache.get(stored, adapters, factors)
    if weight is None:
        if not (updates := _parametrizations(stored, adapters)):
            return None
        cache.products_are_small = not any(update.form.rebuilds_full_weight for update in updates)
        if not rebuilding_is_cheaper(updates, x, base):
            return None
        weight = updated_weight(base, updates)
        cache.set(stored, adapters, factors, weight)
    return F.linear(x, weight, host.bias)
