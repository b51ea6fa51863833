"""``add_adapter`` adds named adapters to one model, side by side; each is inactive until ``activate`` names it."""

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
from ..core.check_keys import can_be_name
from ..core.inject import add_inactive
from ..core.injection_record import adapters_of, methods_named, require_record
from ..core.method import Method, as_methods, from_dict
from ..core.own_parameters import COPIES_ATTRIBUTE
from ..files.allocation_limit import limit_allocation
from ..structure.base_model import ADAPTERS_ATTRIBUTE, split_adapter_key


def add_adapter(
    model: nn.Module,
    source: Method | Sequence[Method] | str | os.PathLike[str],
    name: str | None = None,
    also_train: Sequence[str] = (),
    strict: bool = True,
) -> nn.Module:
    """Add adapters under a new name, inactive until ``activate`` names them.

    Any number lie side by side, of one method or of different ones. What trained, or shall train, in the base itself (a
    head, norms, biases) becomes the adapter's own: copies that take the place of the base's parameters in its calls.
    The model is unchanged if anything is wrong.

    Args:
        model: The base model, adapted or not.
        source: A method or several that go under one name, or a folder that ``save_adapter`` wrote.
        name: Their name in this model. If not given, that of the first method; of a folder whose method has the name
            that its class gives, such as ``lora``, the folder's name: ``adapters/billing`` is activated as ``billing``.
        also_train: With methods, patterns or roles of base modules and parameters of which the adapter gets copies.
        strict: Whether the base must be the one that a folder's adapter was trained on.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The folder is no adapter.
        ValueError: The name is taken, or the adapter does not fit this model.
        RuntimeError: Adapters are paused, within ``disabled`` or ``row_adapters``.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> for task in ("billing", "complaints"):
        ...     _ = lp.add_adapter(model, lp.LoRA(rank=2, targets=["0"]), name=task)
        >>> [key for _, _, key, _ in lp.adapters(model)]
        ['billing', 'complaints']
    """
    if not isinstance(source, (str, os.PathLike)):
        return add_inactive(model, _rename_methods(name, as_methods(source)), also_train)
    config, state = read_adapter(source)
    check_format(config, str(source))
    if also_train:
        raise ValueError(f"also_train={list(also_train)!r} goes with a method; what {source} trained is in its files.")
    stored = [from_dict(data) for data in config["methods"]]
    methods = _rename_methods(name or _folder_name(source, stored), stored)
    try:
        with limit_allocation(sum(tensor.numel() for tensor in state.values())):
            add_inactive(model, methods, config["also_train"])
    except TypeError as error:
        raise ValueError(f"{source} does not fit this model: {error}") from error
    try:
        added = methods_named(require_record(model), methods[0].name)
        if strict:
            check_base(model, config, str(source), added)
        names = dict(zip([method.name for method in stored], methods, strict=True))
        load_values(model, _rename_state(model, state, names, added[-1]), str(source), added)
    except Exception:
        remove_adapter(model, methods[0].name)
        raise
    return model


def _folder_name(folder: str | os.PathLike[str], stored: Sequence[Method]) -> str | None:
    """Return the name of an adapter's folder where its method was given no name of its own, and it can be a name."""
    named = {field.name: field.default for field in dataclasses.fields(stored[0])} if stored else {}
    name = os.path.basename(os.path.normpath(os.fspath(folder)))
    return name if stored and stored[0].name == named["name"] and can_be_name(name) else None


def _rename_methods(name: str | None, methods: Sequence[Method]) -> list[Method]:
    """Return copies of methods that are named after the first of them, with numbers."""
    if not methods:
        raise ValueError("add_adapter needs a method, several, or a folder; got none.")
    group_name = name or methods[0].name
    names = [group_name, *(f"{group_name}_{number}" for number in range(2, len(methods) + 1))]
    return [dataclasses.replace(method, name=new_name) for method, new_name in zip(methods, names, strict=True)]


def _rename_state(
    model: nn.Module, state: Mapping[str, Tensor], new_methods: Mapping[str, Method], copies_method: Method
) -> dict[str, Tensor]:
    """Return a state under the names that its adapters have in this model.

    Args:
        model: The model with the new adapters.
        state: The state, with old names.
        new_methods: New methods by the names of the old ones.
        copies_method: Method that holds copies of the base parameters that trained.
    """
    keys = {
        adapter_key(old, adapter): adapter_key(method.name, adapter)
        for old, method in new_methods.items()
        for adapter in adapters_of(model, method).values()
    }
    renamed = {}
    for key, value in state.items():
        if (place := split_adapter_key(key, new_methods)) is not None:
            host, old_key, entry = place
            new_key = f"{host}.{ADAPTERS_ATTRIBUTE}.{keys.get(old_key, old_key)}.{entry}"
        else:
            host, _, entry = f".{key}".rpartition(".")
            new_key = f"{host}.{ADAPTERS_ATTRIBUTE}.{copies_method.name}.{COPIES_ATTRIBUTE}.{entry}"
        renamed[new_key.lstrip(".")] = value
    return renamed
