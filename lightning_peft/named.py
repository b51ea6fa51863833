"""Adapters side by side in one model: each is added under a name of its own, and lies idle until it is activated."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .base import SLOT
from .describing import check_base, check_format
from .files import load_values
from .folders import read_adapter
from .hosts import key_of
from .inject import adapters_of, inject_idle
from .method import Method, from_dict
from .switching import remove_adapter


def add_adapter(
    model: nn.Module, source: Method | str | os.PathLike[str], name: str | None = None, strict: bool = True
) -> nn.Module:
    """Add adapters under a name of their own; they take part in no call until ``activate`` names them.

    Any number lie side by side, of one method or of different ones. The model is unchanged if anything is wrong.

    Args:
        model: The base model, adapted or not.
        source: A method, or a folder that ``save_adapter`` wrote.
        name: Their name in this model; the method's if not given.
        strict: Whether the base must be the one that a folder's adapter was trained on.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The folder is no adapter.
        ValueError: The name is taken, the adapter does not fit this model, or it trains parameters of the base, of
            which a model has but one copy.
        RuntimeError: No adapter takes part for now, within ``disabled`` or ``row_adapters``.
    """
    if isinstance(source, Method):
        return inject_idle(model, dataclasses.replace(source, name=name or source.name))
    config, state = read_adapter(source)
    stored = _only_method(config, str(source))
    method = dataclasses.replace(stored, name=name or stored.name)
    inject_idle(model, method)
    try:
        if strict:
            check_base(model, config, str(source))
        load_values(model, _renamed(model, state, stored, method), str(source), method.name)
    except Exception:
        remove_adapter(model, method.name)
        raise
    return model


def _only_method(config: Mapping[str, Any], source: str) -> Method:
    check_format(config, source)
    if len(config["methods"]) != 1 or config["also_train"]:
        names = ", ".join(str(data.get("method")) for data in config["methods"])
        raise ValueError(
            f"{source} holds {names} and also_train={config['also_train']}; side by side lie adapters of one method "
            f"each, without parameters of the base. Load it into a model of its own with load_adapter."
        )
    return from_dict(config["methods"][0])


def _renamed(model: nn.Module, state: Mapping[str, Tensor], old: Method, new: Method) -> dict[str, Tensor]:
    """Return a state of the adapters of ``old`` under the names that those of ``new`` have."""
    found = adapters_of(model, new).values()
    keys = {key_of(old.name, adapter): key_of(new.name, adapter) for adapter in found}
    renamed = {}
    for key, value in state.items():
        host, slot, own = f".{key}".partition(f".{SLOT}.")
        first, dot, entry = own.partition(".")
        renamed[f"{host}{slot}{keys.get(first, first)}{dot}{entry}".lstrip(".")] = value
    return renamed
