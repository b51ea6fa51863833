"""Adapters side by side in one model: each is added under a name of its own, and lies idle until it is activated."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..checkpoints.metadata import check_base, check_format
from ..checkpoints.save_load import load_values
from ..core.active_adapters import remove_adapter
from ..core.adapted_module import adapter_key
from ..core.adapter_folder import read_adapter
from ..core.inject import add_inactive
from ..core.injection_record import adapters_of, methods_named, require_record
from ..core.method import Method, from_dict
from ..core.own_parameters import COPIES_ATTRIBUTE
from ..structure.base_model import ADAPTERS_ATTRIBUTE


def add_adapter(
    model: nn.Module,
    source: Method | Sequence[Method] | str | os.PathLike[str],
    name: str | None = None,
    also_train: Sequence[str] = (),
    strict: bool = True,
) -> nn.Module:
    """Add adapters under a name of their own; they take part in no call until ``activate`` names them.

    Any number lie side by side, of one method or of different ones. What trained, or shall train, in the base itself (a
    head, norms, biases) becomes the adapter's own: copies that take the place of the base's parameters in its calls.
    The model is unchanged if anything is wrong.

    Args:
        model: The base model, adapted or not.
        source: A method or several that go under one name, or a folder that ``save_adapter`` wrote.
        name: Their name in this model; the first method's if not given.
        also_train: With methods, patterns or roles of base modules and parameters that the adapter has of its own.
        strict: Whether the base must be the one that a folder's adapter was trained on.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The folder is no adapter.
        ValueError: The name is taken, or the adapter does not fit this model.
        RuntimeError: No adapter takes part for now, within ``disabled`` or ``row_adapters``.
    """
    if not isinstance(source, (str, os.PathLike)):
        given = [source] if isinstance(source, Method) else list(source)
        return add_inactive(model, _under(name, given), also_train)
    config, state = read_adapter(source)
    check_format(config, str(source))
    if also_train:
        raise ValueError(f"also_train={list(also_train)!r} goes with a method; what {source} trained is in its files.")
    stored = [from_dict(data) for data in config["methods"]]
    methods = _under(name, stored)
    add_inactive(model, methods, config["also_train"])
    try:
        added = methods_named(require_record(model), methods[0].name)
        if strict:
            check_base(model, config, str(source), added)
        names = dict(zip([method.name for method in stored], methods, strict=True))
        load_values(model, _renamed(model, state, names, added[-1]), str(source), added)
    except Exception:
        remove_adapter(model, methods[0].name)
        raise
    return model


def _under(name: str | None, methods: Sequence[Method]) -> list[Method]:
    """Return methods under the names that they have in the model."""
    if not methods:
        raise ValueError("add_adapter needs a method, several, or a folder; got none.")
    first = name or methods[0].name
    names = [first, *(f"{first}_{number}" for number in range(2, len(methods) + 1))]
    return [dataclasses.replace(method, name=new) for method, new in zip(methods, names, strict=True)]


def _renamed(
    model: nn.Module, state: Mapping[str, Tensor], new: Mapping[str, Method], own: Method
) -> dict[str, Tensor]:
    """Return a state under the names that its adapters have here.

    Args:
        model: The model with the new adapters.
        state: The state, with old names.
        new: New methods by the names of the old ones.
        own: Method of what trained in the base itself.
    """
    keys = {
        adapter_key(old, adapter): adapter_key(method.name, adapter)
        for old, method in new.items()
        for adapter in adapters_of(model, method).values()
    }
    renamed = {}
    for key, value in state.items():
        host, slot, rest = f".{key}".partition(f".{ADAPTERS_ATTRIBUTE}.")
        if slot:
            first, dot, entry = rest.partition(".")
            new_key = f"{host}{slot}{keys.get(first, first)}{dot}{entry}"
        else:
            host, _, entry = f".{key}".rpartition(".")
            new_key = f"{host}.{ADAPTERS_ATTRIBUTE}.{own.name}.{COPIES_ATTRIBUTE}.{entry}"
        renamed[new_key.lstrip(".")] = value
    return renamed
