"""``check_names`` and ``check_keys`` keep the names of methods, adapters and modules of the base apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..structure.base_model import ADAPTERS_ATTRIBUTE, own_tensors, split_adapter_key
from .adapted_module import AdaptedModule, can_hold_adapters
from .adapter import Adapter


def check_names(names: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    """Raise where methods share a name, or a name cannot be that of a child module beside the modules of the base."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"Two methods are named {name!r}; give one of them another name: name=... of add_adapter, import_peft, "
                f"or of the method."
            )
        if not isinstance(name, str):
            raise TypeError(f"A method's name is a string, got {name!r}; write name='{name}'.")
        if not can_be_name(name):
            raise ValueError(
                f"A method cannot be named {name!r}: choose a name without dots, which does not begin with _ and is "
                f"not one that torch uses."
            )
    check_base_names(modules, names)


def can_be_name(name: str) -> bool:
    """Whether a name can be that of a child module."""
    # Of an instance, since some attributes, such as training, are not those of the class.
    return bool(name) and "." not in name and not name.startswith("_") and not hasattr(nn.ModuleDict(), name)


def check_base_names(modules: Mapping[str, nn.Module], methods: Sequence[str]) -> None:
    """Raise where a tensor of the base would be taken for one of an adapter when a file is read."""
    for name in (f"{n}.{key}" for n, module in modules.items() for key in own_tensors(module)):
        if (place := split_adapter_key(name, methods)) is not None:
            raise ValueError(
                f"{name} of the base has the name of an adapter's tensor in files, since it lies below a module called "
                f"{ADAPTERS_ATTRIBUTE!r} and a method is named name={place[1]!r}; give the method another name."
            )


def check_keys(host: nn.Module, name: str, key: str, adapter: Adapter) -> None:
    """Raise if an adapter has no place of its own on its host, or in files."""
    if not can_hold_adapters(host):
        raise TypeError(
            f"{name} has an attribute {ADAPTERS_ATTRIBUTE!r} or 'peft_order' of its own, where its adapters would live."
        )
    if isinstance(host, AdaptedModule) and key in host.peft:
        raise ValueError(f"{name} already has an adapter {key!r}; give the method another name.")
    if below := [n for n in adapter.state_dict(keep_vars=True) if ADAPTERS_ATTRIBUTE in n.split(".")]:
        raise TypeError(
            f"{type(adapter).__name__} has a tensor {below[0]}; call its module otherwise than {ADAPTERS_ATTRIBUTE!r}, "
            f"below which files keep adapters."
        )


def check_keys_differ(placed: Sequence[tuple[str, nn.Module, str, Adapter]]) -> None:
    """Raise where two adapters of one injection, given as (name, host, key, adapter), have one key on one host."""
    seen = set[tuple[str, str]]()
    for name, _, key, adapter in placed:
        if (name, key) in seen:
            raise ValueError(
                f"Two adapters {key!r} go to {name}, of which the second would replace the first: select returns a "
                f"layer once for each of its parts. Give the rows to WeightUpdate.__init__, set part and rows of "
                f"{type(adapter).__name__}, or use select_modules."
            )
        seen.add((name, key))
