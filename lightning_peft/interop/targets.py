"""``target_settings`` writes ``target_modules`` and related settings; ``target_hosts`` reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..checkpoints.adapter_state import strip_wrapper_names
from ..structure.base_model import base_modules
from .module_names import unique_suffixes
from .peft_format import Base, check_supported

SETTINGS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")


def target_settings(base: Base, hosts: Collection[str]) -> dict[str, Any]:
    """Return settings that name exactly these modules."""
    names = [strip_wrapper_names(name) for name in base_modules(base.network)]
    targets = unique_suffixes(hosts, names)
    surplus = [
        name
        for name in names
        if name not in hosts and any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    ambiguous = [
        name for name in hosts if any(name == excluded or name.endswith(f".{excluded}") for excluded in surplus)
    ]
    check_supported(bool(ambiguous), f"Adapting {ambiguous[:1]} alone", "its name is the end of another's")
    return {"target_modules": targets, **({"exclude_modules": surplus} if surplus else {})}


def target_hosts(base: Base, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the modules that a list or a regular expression names; for other wordings, none."""
    targets, saved = config.get("target_modules") or [], config.get("modules_to_save") or []
    if targets == "all-linear" or config.get("layers_to_transform") is not None:
        return
    for name in base_modules(base.network):
        excluded = _fits(name, config.get("exclude_modules") or []) or any(
            re.match(rf"(^|.*\.){suffix}($|\..*)", name) for suffix in saved
        )
        if _fits(name, targets) and not excluded:
            yield name


def is_targeted(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a list or a regular expression names a module."""
    return _fits(name, config.get("target_modules") or [])


def _fits(name: str, pattern: str | Collection[str]) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern)


def ends_like(name: str, pattern: str | Collection[str]) -> bool:
    """Return whether a name has one of these ends, or fits a regular expression as a whole."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name.endswith(suffix) for suffix in pattern)


def by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the setting of a module from a mapping of regular expressions for the ends of names."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
