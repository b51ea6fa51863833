"""Names of modules: what the other side calls the model, and patterns for exactly the modules that are meant."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from ..checkpoints.adapter_state import strip_wrapper_names
from ..structure.base_model import base_modules, matches
from ..structure.selection import literal
from ..structure.transformers_api import has_input_embeddings


def network(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the module that other libraries know: the one transformers model, or else all of it."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in [("", model), *base_modules(model).items()]:
        inside = any(f"{name}.".startswith(f"{other}.") or not other for other, _ in found)
        if not inside and _is_pretrained(module):
            found.append((name, module))
    if len(found) != 1:
        return "", model
    (name, module), *_ = found
    return strip_wrapper_names(f"{name}.").rstrip("."), module


def _is_pretrained(module: Any) -> bool:
    named = isinstance(getattr(type(module), "base_model_prefix", None), str)
    return named and has_input_embeddings(module) and hasattr(module, "config")


def joined(*names: str) -> str:
    """Return names as one dotted name; empty ones are left out."""
    return ".".join(name for name in names if name)


def unique_suffixes(wanted: Collection[str], known: Iterable[str]) -> list[str]:
    """Return the shortest ends of names by which the wanted ones, and no other known ones, are found.

    Where even a whole name is the end of another one's, it is returned as it is.
    """
    inside = set(wanted)
    others = [name for name in known if name not in inside]
    alone = functools.cache(lambda end: not any(other.endswith(end) for other in others))  # layers share their ends
    found = dict[str, None]()
    for name in wanted:
        parts = name.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        short = (end for end in ends if not end[0].isdigit() and alone(end))
        found[next(short, name)] = None
    return list(found)


def globs(wanted: Collection[str], model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the ``targets`` and ``exclude`` of a method that adapts exactly these modules."""
    known = list(base_modules(model))
    targets = [literal(end) for end in unique_suffixes(wanted, known)]
    surplus = [name for name in known if name not in wanted and any(matches(name, target) for target in targets)]
    return targets, [literal(name) for name in surplus]


def by_length(pattern: dict[str, Any]) -> dict[str, Any]:
    """Return settings by name with longer names first: the first that fits the end of a name counts."""
    return dict(sorted(pattern.items(), key=lambda item: -len(item[0])))
