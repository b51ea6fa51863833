"""``find_network`` finds the module that other libraries know; ``exact_globs`` names modules by short patterns."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from ..checkpoints.adapter_state import strip_wrapper_names
from ..structure.base_model import base_modules, matches
from ..structure.expert_layers import expert_weight_names
from ..structure.selection import literal
from ..structure.transformers_api import has_input_embeddings


def find_network(model: nn.Module, adapted: Collection[str] = ()) -> tuple[str, nn.Module]:
    """Return the name and the module that other libraries know: the one transformers model, or else all of it.

    Args:
        model: The module that holds it.
        adapted: Names of what is adapted or trains; of several transformers models, it is the one that has all of it.
    """
    networks = pretrained_networks(model)
    if len(networks) > 1:
        networks = {name: net for name, net in networks.items() if all(is_below(key, name) for key in adapted)}
    return next(iter(networks.items())) if len(networks) == 1 else ("", model)


def pretrained_networks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost transformers models in a module by name."""
    networks = dict[str, nn.Module]()
    for name, module in [("", model), *base_modules(model).items()]:
        if not any(is_below(name, outer) for outer in networks) and _is_pretrained(module):
            networks[name] = module
    return {strip_wrapper_names(f"{name}.").rstrip("."): module for name, module in networks.items()}


def is_below(name: str, outer: str) -> bool:
    """Return whether a name is another one, or of something in it; all is in the empty name."""
    return not outer or f"{name}.".startswith(f"{outer}.")


def _is_pretrained(module: Any) -> bool:
    named = isinstance(getattr(type(module), "base_model_prefix", None), str)
    return named and has_input_embeddings(module) and hasattr(module, "config")


def join_names(*names: str) -> str:
    """Return names as one dotted name; empty ones are left out."""
    return ".".join(name for name in names if name)


def unique_suffixes(wanted: Collection[str], known: Iterable[str], words_at_least: int = 1) -> list[str]:
    """Return the shortest ends of names by which the wanted ones, and no other known ones, are found.

    Where even a whole name is the end of another one's, it is returned as it is.
    """
    included = set(wanted)
    unwanted = [name for name in known if name not in included]
    is_unique = functools.cache(lambda suffix: not any(other.endswith(suffix) for other in unwanted))  # for all layers
    suffixes = dict[str, None]()
    for name in wanted:
        words = name.split(".")
        candidates = [".".join(words[-count:]) for count in range(words_at_least, len(words) + 1)]
        unique = (suffix for suffix in candidates if not suffix[0].isdigit() and is_unique(suffix))
        suffixes[next(unique, name)] = None
    return list(suffixes)


def exact_globs(wanted: Collection[str], model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the ``targets`` and ``exclude`` of a method that adapts exactly these modules."""
    modules, of_experts = list(base_modules(model)), expert_weight_names(model)
    wanted_of_experts = [name for name in of_experts if name in wanted]
    suffixes = [
        *unique_suffixes([name for name in wanted if name not in wanted_of_experts], modules),
        *unique_suffixes(wanted_of_experts, [*modules, *of_experts], words_at_least=2),
    ]
    targets = [literal(suffix) for suffix in suffixes]
    surplus = [name for name in modules if name not in wanted and any(matches(name, target) for target in targets)]
    dotted = [target for target in targets if "." in target]
    surplus += [name for name in of_experts if name not in wanted and any(matches(name, t) for t in dotted)]
    return targets, [literal(name) for name in surplus]


def longest_first(pattern: dict[str, Any]) -> dict[str, Any]:
    """Return settings by name with longer names first: the first that fits the end of a name counts."""
    return dict(sorted(pattern.items(), key=lambda item: -len(item[0])))
