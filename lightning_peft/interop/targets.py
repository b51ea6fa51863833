"""Which modules an adapter of weights is for: ``target_modules`` and its relatives."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..checkpoints.adapter_state import strip_wrapper_names
from ..structure.base_model import base_modules
from .module_names import unique_suffixes
from .peft_format import Base, check_supported

SETTINGS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")


def written(base: Base, hosts: Collection[str]) -> dict[str, Any]:
    """Return settings that name exactly these modules."""
    known = [strip_wrapper_names(name) for name in base_modules(base.network)]
    targets = unique_suffixes(hosts, known)
    surplus = [n for n in known if n not in hosts and any(n == t or n.endswith(f".{t}") for t in targets)]
    hidden = [n for n in hosts if any(n == s or n.endswith(f".{s}") for s in surplus)]
    check_supported(bool(hidden), f"Adapting {hidden[:1]} alone", "its name is the end of another's")
    return {"target_modules": targets, **({"exclude_modules": surplus} if surplus else {})}


def named(base: Base, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the modules that a list or a regular expression names; for other wordings, none."""
    targets, saved = config.get("target_modules") or [], config.get("modules_to_save") or []
    if targets == "all-linear" or config.get("layers_to_transform") is not None:
        return
    for name in base_modules(base.network):
        left_out = _fits(name, config.get("exclude_modules") or []) or any(
            re.match(rf"(^|.*\.){end}($|\..*)", name) for end in saved
        )
        if _fits(name, targets) and not left_out:
            yield name


def _fits(name: str, pattern: str | Collection[str]) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in pattern)


def by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the setting of a module from a mapping of regular expressions for the ends of names."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
