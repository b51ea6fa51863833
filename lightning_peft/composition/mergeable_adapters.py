"""``mergeable_adapters`` returns the adapters that ``merge`` folds into weights, in the order of folding."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.adapted_module import adapters
from ..core.adapter import Adapter
from ..core.checks import shows_weight
from ..core.injection_record import get_record
from ..structure.base_model import count_owners
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
    inactive = [key for _, host, key, _ in adapted if key not in host.peft_order]
    if inactive and not allow_inactive:
        raise ValueError(
            f"{inactive[0]!r} is not active and would be lost; activate it, or take it out with remove_adapter."
        )
    adapted = [entry for entry in adapted if entry[2] in entry[1].peft_order]
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
        if any(owners[id(p)] > 1 for p in host._parameters.values() if p is not None):
            raise ValueError(f"{name} shares a parameter with another module; untie it before merging.")
    # Adapters that replace parameters come first: what others add goes on top of the replaced values, as in forward.
    return sorted(adapted, key=lambda entry: (not entry[3].replaces, entry[1].peft_order.index(entry[2])))
