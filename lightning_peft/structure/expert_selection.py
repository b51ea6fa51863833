"""``select_with_experts``: layers, and beside them the weights of experts, for methods that adapt both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from .base_model import base_modules
from .expert_layers import ExpertWeight, expert_weights, requested_weights, warn_of_unmeasured
from .selection import Target, layer_targets, selected_targets
from .towers import in_scope, split_scope


class ExpertTarget(NamedTuple):
    """Host for one adapter of the weights of experts.

    Args:
        name: Dotted name of the host.
        host: The module that holds the experts.
        weight: Which of its weights.
    """

    name: str
    host: nn.Module
    weight: ExpertWeight

    @property
    def weight_name(self) -> str:
        """Dotted name of the weight."""
        return f"{self.name}.{self.weight.part}"


class Selected(NamedTuple):
    """What targets mean: layers, and weights of experts."""

    layers: list[Target]
    experts: list[ExpertTarget]


def expert_targets(
    model: nn.Module, meant_by: Mapping[str, Sequence[str]], exclude: Sequence[str] = ()
) -> list[ExpertTarget]:
    """Return the weights of experts that targets mean, which are given by the name of each selected module."""
    modules, scopes = base_modules(model), [split_scope(pattern) for pattern in exclude]
    return [
        ExpertTarget(name, modules[name], weight)
        for name, targets in meant_by.items()
        for weight in requested_weights(
            name, modules[name], targets, [end for scope, end in scopes if in_scope(model, scope, [name])]
        )
    ]


def select_with_experts(model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = ()) -> Selected:
    """Return the layers and the weights of experts that targets mean, in the model's order.

    Arguments and errors are those of ``select``; globs also match the names of weights of experts.
    """
    modules, meant_by = base_modules(model), selected_targets(model, targets, exclude, experts=True)
    experts = expert_targets(model, meant_by, exclude)
    layers = layer_targets(model, {name: by for name, by in meant_by.items() if not expert_weights(modules[name])})
    if any(split_scope(target)[1] == "all-linear" for target in targets):
        warn_of_unmeasured(model)
    if not (layers or experts):
        raise ValueError(f"exclude={list(exclude)!r} leaves nothing of targets={list(targets)!r}.")
    return Selected(layers, experts)
