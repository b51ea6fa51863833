"""``mergeable_adapters`` returns what ``merge`` folds into weights, in order; ``rehearse_merge`` tries it on copies."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core.active_on_host import active_keys
from ..core.adapted_module import adapters
from ..core.adapter import Adapter
from ..core.check_placed import check_placed
from ..core.checks import shows_weight
from ..core.injection_record import get_record
from ..structure.base_model import ADAPTERS_ATTRIBUTE, count_owners
from ..structure.quantized import is_quantized
from ..structure.read_weights import read_weight_attribute

HostedAdapter = tuple[str, Any, str, Adapter]  # name of the host, the host, the adapter's key there, the adapter


def mergeable_adapters(model: nn.Module, allow_inactive: bool = False) -> list[HostedAdapter]:
    """Return the active ones of ``adapters(model)``, inner before outer, if all can be merged.

    Args:
        model: An adapted model.
        allow_inactive: Whether there may be inactive ones, which merging for good would lose.
    """
    adapted: list[HostedAdapter] = list(adapters(model))
    if not adapted and get_record(model) is None:
        raise ValueError("There is nothing to merge: no method was injected into this model.")
    if get_record(model) is not None:
        check_placed(model)
    inactive = [key for _, host, key, _ in adapted if key not in active_keys(host)]
    if inactive and not allow_inactive:
        raise ValueError(
            f"{inactive[0]!r} is not active and would be lost; activate it, or take it out with remove_adapter."
        )
    adapted = [entry for entry in adapted if entry[2] in active_keys(entry[1])]
    owners = count_owners(model)
    for name, host, key, adapter in adapted:
        if type(adapter).merge is Adapter.merge:
            raise TypeError(f"{key!r} at {name} cannot be merged: {adapter.unmergeable}.")
        if read_weight_attribute(type(host)) and not (shows_weight(adapter) or adapter.replaces):
            raise TypeError(
                f"{key!r} at {name} cannot be merged: {type(adapter).__name__} changes what {type(host).__name__} "
                f"returns, and its merge would write a weight that is read inside. Override effective_weight and "
                f"effective_bias in it, or keep the adapter."
            )
        is_tied = any(owners[id(p)] > 1 for p in host._parameters.values() if p is not None)
        if is_tied and (allow_inactive or not adapter.merges_ties):  # what is kept would be shown of one module alone
            raise ValueError(f"{name} shares a parameter with another module; untie it before merging.")
    # Adapters that replace parameters come first: what others add goes on top of the replaced values, as in forward.
    return sorted(adapted, key=lambda entry: (not entry[3].replaces, active_keys(entry[1]).index(entry[2])))


def tensors_of(adapted: Sequence[HostedAdapter]) -> dict[str, Tensor]:
    """Return the parameters of adapters by the names that they have in the model."""
    return {
        f"{name}.{ADAPTERS_ATTRIBUTE}.{key}.{entry}".lstrip("."): parameter
        for name, _, key, adapter in adapted
        for entry, parameter in adapter.named_parameters()
    }


@torch.no_grad()
def rehearse_merge(adapted: Sequence[HostedAdapter]) -> None:
    """Merge into a copy of the first host of each kind, so that what cannot be merged raises while nothing is changed.

    A kind is the class of a host, the names of its parameters, and the classes of its adapters. Left out are copies of
    parameters, whose hosts can be whole models, and what is quantized or sharded.
    """
    by_host, tried = defaultdict[int, list[HostedAdapter]](list), set[tuple[Any, ...]]()
    for entry in adapted:
        by_host[id(entry[1])].append(entry)
    for entries in by_host.values():
        host, merging = entries[0][1], [adapter for *_, adapter in entries if not adapter.replaces]
        parameters = {name: p for name, p in host._parameters.items() if p is not None}
        kind = (type(host), *parameters, *map(type, merging))
        special = is_quantized(host) or any(isinstance(p, DTensor) for p in host.parameters())
        if merging and not special and kind not in tried:
            tried.add(kind)
            twin = copy.deepcopy(host)
            for adapter in merging:
                adapter.merge(twin)
