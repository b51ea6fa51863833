"""``check_placed``: notices that a module was replaced after injection, and its adapters with it."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .adapted_module import adapters, method_name
from .injection_record import require_record


def check_placed(model: nn.Module) -> None:
    """Raise a ``RuntimeError`` if adapters that were injected into a model are no longer in it."""
    placed = require_record(model).placed
    found = [(method_name(key, adapter), name) for name, _, key, adapter in adapters(model)]
    counts = Counter(method for method, _ in found)
    for method, hosts in placed.items():
        if counts[method] < len(hosts):
            names = [f".{name}" for found_method, name in found if found_method == method]  # of a module around, too
            lost = [host for host in hosts if not any(name.endswith(f".{host}") for name in names)] or hosts
            raise RuntimeError(
                f"{method!r} had an adapter on {lost[0]}, which is no longer in the model: the module was replaced "
                f"after injection, as resize_token_embeddings replaces embeddings and heads, and what its adapter "
                f"trained is lost. Change the model first; then inject, or load an adapter that was saved before."
            )
