"""``names_by_loading``: names of modules and tensors as transformers renames them when it loads older files."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Collection
from typing import Any

from .transformers_api import from_config


def names_by_loading(model: Any, known: Collection[str], ending: str) -> Callable[[str], str]:
    """Return a function that renames what another release, or a model with another head, wrote, as loading does.

    Releases before 5 keep their rules on the class of a model, later ones collect them from all of its modules. The
    name of the backbone is then added, or left out, where the result is known.

    Args:
        model: A model of transformers; names of other models stay as they are.
        known: Names that the model has, of modules or of tensors.
        ending: What makes the names those of tensors, of which the rules are; empty if they are.
    """
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str):
        return lambda name: name
    rename = _renaming(model)

    def place(name: str) -> str:
        name = rename(name + ending).removesuffix(ending)
        if name in known or not prefix:
            return name
        without = name.removeprefix(f"{prefix}.")
        return without if without in known else f"{prefix}.{name}"

    return place


def _renaming(model: Any) -> Callable[[str], str]:
    """Return how transformers renames a tensor that it reads for a model."""
    collect = getattr(sys.modules.get("transformers.conversion_mapping"), "get_model_conversion_mapping", None)
    if collect is None:  # before transformers 5
        old = getattr(type(model), "_checkpoint_conversion_mapping", None) or {}
        return lambda name: next((re.sub(part, new, name) for part, new in old.items() if re.search(part, name)), name)
    # Rules that compute tensors from several others, such as fused experts, have operations.
    rules = [rule for rule in collect(model) if not hasattr(rule, "operations")]
    return lambda name: functools.reduce(lambda renamed, rule: str(rule.rename_source_key(renamed)[0]), rules, name)


def renamed_like(model: Any) -> str | None:
    """Return the type of the model by whose rules transformers renames the weights of this one; None for its own."""
    patterns = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    kind: str | None = patterns.get(from_config(model, "model_type"))
    return kind
