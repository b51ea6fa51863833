"""``base_modules`` and ``base_parameters``: the modules and parameters of the base model by name, without adapters."""

from __future__ import annotations

import re
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

ADAPTERS_ATTRIBUTE = "peft"  # the child of an adapted module below which its adapters live; never part of the base


def matches(name: str, pattern: str) -> bool:
    """Return whether a glob matches the end of a dotted name: ``q_proj`` matches ``layers.0.attn.q_proj``."""
    return fnmatchcase("." + name, "*." + pattern)


def name_pattern(name: str) -> str:
    """Return a name with ``*`` in place of numbers, which is the same for one layer in all blocks."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the base model by name, adapters and the root left out."""
    return {
        name: module for name, module in model.named_modules() if name and f".{ADAPTERS_ATTRIBUTE}." not in f".{name}."
    }


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the base model by name, adapters left out; a shared one appears once."""
    return {
        name: parameter for name, parameter in model.named_parameters() if f".{ADAPTERS_ATTRIBUTE}." not in f".{name}"
    }


def own_tensors(module: nn.Module) -> dict[str, Any]:
    """Return the parameters and buffers registered on the module itself, not on its children; empty ones are None."""
    return {**module._parameters, **module._buffers}


def computed_from(host: nn.Module) -> list[str]:
    """Return the names of the parameters from which a layer computes its weight in each call; empty if it stores it.

    ``torch.nn.utils.parametrizations``, ``weight_norm``, ``spectral_norm`` and ``prune`` make layers compute it.
    """
    if "weight" in own_tensors(host) or not isinstance(getattr(host, "weight", None), Tensor):
        return []
    return [name for name, _ in host.named_parameters() if "weight" in name]


def count_owners(model: nn.Module) -> Counter[int]:
    """Return the number of modules that hold each parameter, by the parameter's id."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
