"""``towers``: the parts of a model that read images, text or sound; ``in_scope``: targets that mean one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .base_model import base_modules, is_inside, matches
from .structure_of import structure_of
from .transformers_api import from_config, is_pretrained

KINDS = ("vision", "language", "audio")
_MODALITIES = {"text": "language", "image": "vision", "video": "vision", "audio": "audio"}
_MODALITY_OF_INPUT = {  # before transformers 5
    **{"input_ids": "text", "pixel_values": "image", "pixel_values_videos": "video"},
    **{"input_features": "audio", "input_values": "audio"},
}


def towers(model: nn.Module) -> dict[str, str]:
    """Return the towers of a model: the name of each, and its kind (``vision``, ``language``, ``audio`` or mixed).

    They are the outermost models of transformers with blocks that read one kind of input, or hold no others that do.
    """
    blocks = structure_of(model).names["blocks"]
    found: dict[str, str] = {}
    parts = [(name, m) for name, m in [("", model), *base_modules(model).items()] if is_pretrained(m)]
    for name, module in parts:
        if any(is_inside(name, tower) for tower in found) or not any(is_inside(block, name) for block in blocks):
            continue
        kinds = _kinds_read(module)
        inner = [part for part, _ in parts if part != name and is_inside(part, name)]
        if len(kinds) == 1 or not any(is_inside(block, part) for block in blocks for part in inner):
            found[name] = " and ".join(sorted(kinds)) or "unknown"
    return found


def split_scope(target: str) -> tuple[str, str]:
    """Return the scope and the rest of a target such as ``vision:all-linear``; an empty scope for others."""
    scope, colon, rest = target.rpartition(":")
    return (scope, rest) if colon else ("", target)


def in_scope(model: nn.Module, scope: str, names: Sequence[str]) -> list[str]:
    """Return the names inside of a scope: the modules that a glob matches, or the towers of a kind.

    Raises:
        ValueError: The scope means no module; the message lists the towers.
    """
    if not scope:
        return list(names)
    modules = [name for name in base_modules(model) if matches(name, scope)]
    if not modules and scope in KINDS:
        modules = [name for name, kind in towers(model).items() if scope in kind.split(" and ")]
    if not modules:
        known = ", ".join(f"{name or 'the model'} ({kind})" for name, kind in towers(model).items()) or "none are known"
        raise ValueError(
            f"The scope {scope!r} means no module. Name one by a glob, or a kind: {', '.join(KINDS)}. Towers: {known}."
        )
    return [name for name in names if any(is_inside(name, module) for module in modules)]


def _kinds_read(module: Any) -> set[str]:
    """Return which of ``vision``, ``language`` and ``audio`` a model of transformers reads; empty for other modules."""
    names: Any = getattr(module, "input_modalities", None)
    if names is None:  # before transformers 5
        names = _MODALITY_OF_INPUT.get(getattr(module, "main_input_name", ""), "")
        if all(from_config(module, f"{kind}_config") is not None for kind in ("text", "vision")):
            names = ("text", "image")
    return {_MODALITIES[name] for name in ([names] if isinstance(names, str) else names) if name in _MODALITIES}
