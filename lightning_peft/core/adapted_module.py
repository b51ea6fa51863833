"""``attach`` swaps a module's class for a cached subclass whose ``forward`` runs its adapters around the original."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from ..ops.sharded_tensors import is_sharded
from ..structure.base_model import ADAPTERS_ATTRIBUTE
from ..structure.read_weights import read_bias_attribute, read_weight_attribute
from .active_on_host import active_keys, called_adapters, current_tensor, inactive, owner_of
from .active_set import LocalActiveSet
from .adapter import Adapter, InnerCall
from .fast_path import AdapterDict

_ORDER = "peft_order"  # attribute of hosts


class AdaptedModule:
    """First base class of every module with adapters; the second one is the module's own class."""

    _host_class: Any
    _replaced: frozenset[str] = frozenset()  # names of parameters and buffers that adapters may replace
    peft: nn.ModuleDict
    peft_order: tuple[str, ...]  # keys of the adapters active by default, inner first; written by this file alone
    peft_local: LocalActiveSet | None = None  # None for hosts of temporary adapters alone
    peft_number: int
    peft_temporary: tuple[str, ...] = ()  # keys of the adapters that exist during one run only

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        build, (cls, *args), *rest = reduced
        if cls is not adapted_class(self._host_class, self._replaced):  # FSDP2 put its own subclass in front
            return build, (cls, *args), *rest
        return _rebuild, (self._host_class, self._replaced), *rest


@functools.cache
def adapted_class(cls: Any, replaced: frozenset[str]) -> type[nn.Module]:
    """Return the subclass of ``cls`` that runs adapters, which may replace parameters and buffers of these names."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (adapters := called_adapters(self)):
            return cls.forward(self, *args, **kwargs)
        outermost = adapters.pop()
        return outermost(self, InnerCall(self, cls.forward, adapters), *args, **kwargs)

    # The same name: libraries look models up by it (loss functions, wrapping policies, saved configurations).
    namespace = {"forward": forward, "_host_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    if replaced:
        namespace |= {"_replaced": replaced, "__setattr__": _setattr, "_load_from_state_dict": _load_stored}
        namespace |= {name: _current(name) for name in replaced}
    if (weight_name := read_weight_attribute(cls)) is not None:
        namespace |= _effective_properties(weight_name, read_bias_attribute(cls))
    if issubclass(cls, nn.Sequential):
        # It calls all of its children in turn: iteration leaves out the ``ModuleDict`` of the adapters, which is the
        # last child. Negative indices and slices count from the length, which leaves it out for that reason.
        namespace["__iter__"] = lambda self: iter([child for child in cls.__iter__(self) if child is not self.peft])
        namespace["__len__"] = lambda self: cls.__len__(self) - 1
    return type(cls.__name__, (AdaptedModule, cls), namespace)


def _current(name: str) -> property:
    """Return a property in place of a parameter or buffer, which is an adapter's while that is active."""
    return property(lambda self: current_tensor(self, name))


def _setattr(self: Any, name: str, value: Any) -> None:
    """Let a forward that assigns a buffer of its module change the copy that is in its place."""
    owner = owner_of(self, name) if name in self._replaced and name in self._buffers else None
    if owner is None:
        super(AdaptedModule, self).__setattr__(name, value)
    else:
        owner.assign_replacement(name, value)


def _load_stored(self: Any, *args: Any, **kwargs: Any) -> None:
    """Load values into the tensors of the module itself, whatever is in their place."""
    with inactive([self]):
        super(AdaptedModule, self)._load_from_state_dict(*args, **kwargs)


def _effective_properties(weight_name: str, bias_name: str) -> dict[str, property]:
    """Return properties in place of a weight and a bias that the parent module reads: with the active adapters.

    FSDP2, which reads them as it moves and shards parameters, gets the stored ones while they are shards.
    """

    def effective_weight(self: Any) -> Any:
        weight = current_tensor(self, weight_name)
        for adapter in () if is_sharded(weight) else called_adapters(self):
            weight = adapter.effective_weight(weight)
        return weight

    def effective_bias(self: Any) -> Any:
        bias = current_tensor(self, bias_name)
        for adapter in () if is_sharded(bias) else called_adapters(self):
            bias = adapter.effective_bias(bias)
        return bias

    return {weight_name: property(effective_weight), bias_name: property(effective_bias)}


def _rebuild(cls: Any, replaced: frozenset[str] = frozenset()) -> nn.Module:
    new = adapted_class(cls, replaced)
    return new.__new__(new)


def can_hold_adapters(module: nn.Module) -> bool:
    """Return whether the place of a module's adapters is free, or holds some."""
    return isinstance(module, AdaptedModule) or not any(hasattr(module, name) for name in (ADAPTERS_ATTRIBUTE, _ORDER))


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Adapter]]:
    """Yield (host's name, host, adapter's key, adapter); hosts are found by type, never by the spelling of a name.

    Temporary adapters, which exist during one run only, are left out.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), lp.LoRA(rank=2, targets=["0"]))
        >>> [(name, key, adapter.a.shape) for name, host, key, adapter in lp.adapters(model)]
        [('0', 'lora', torch.Size([2, 16]))]
    """
    hosts: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, AdaptedModule)]
    for name, host in hosts:
        for key, adapter in host.peft.items():
            if adapter.persistent:
                yield name, host, key, adapter


def active_adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield (host's name, adapter) of the active adapters, inner before outer."""
    active = [entry for entry in adapters(model) if entry[2] in active_keys(entry[1])]
    for name, _, _, adapter in sorted(active, key=lambda entry: active_keys(entry[1]).index(entry[2])):
        yield name, adapter


def adapter_key(name: str, adapter: Adapter) -> str:
    """Return the key, in ``host.peft``, of an adapter that belongs to the method of this name."""
    return f"{name}_{adapter.part}" if adapter.part else name


def method_name(key: str, adapter: Adapter) -> str:
    """Return the name of the method that an adapter belongs to; the inverse of ``adapter_key``."""
    return key.removesuffix(f"_{adapter.part}") if adapter.part else key


def replaced_names(placed: Iterable[tuple[str, Adapter]]) -> set[str]:
    """Return the names of base parameters that adapters, given as (name of the host, adapter), replace during calls."""
    return {f"{name}.{key}".lstrip(".") for name, adapter in placed for key in adapter.replaces}


def attach(host: Any, key: str, adapter: Adapter, active: bool = True, local: LocalActiveSet | None = None) -> None:
    """Add an adapter to a host, outside of the active ones; an inactive adapter is stored and not called."""
    if not isinstance(host, AdaptedModule):
        if not can_hold_adapters(host):
            raise TypeError(f"{type(host).__name__} has an attribute 'peft' or 'peft_order' of its own.")
        host.peft, host.peft_order = AdapterDict(host), ()
        cls: Any = type(host)
        host.__class__ = adapted_class(cls, frozenset())
    if local is not None and host.peft_local is None:
        host.peft_local, host.peft_number = local, local.number_for()
    if host.peft_local is not None:
        host.peft_local.known.clear()
    parameter = next(host.parameters(), None)
    if parameter is not None and any(p.device != parameter.device for p in adapter.parameters()):
        adapter.to(parameter.device)
    host.peft[key] = adapter
    if not host._replaced.issuperset(adapter.replaced_tensors):
        host.__class__ = adapted_class(host._host_class, host._replaced.union(adapter.replaced_tensors))
    host.peft_order += (key,) if active else ()
    host.peft_temporary += () if adapter.persistent else (key,)
    if adapter.training != host.training:
        adapter.train(host.training)


def set_active(host: Any, keys: Sequence[str]) -> None:
    """Let the adapters of these keys, and no others, be active by default, inner before outer."""
    host.peft_order = tuple(keys)


def remove(host: Any, key: str) -> None:
    """Undo ``attach``; once its last adapter is removed, the host has its original class again."""
    host.peft.pop(key)
    host.peft_order = tuple(active for active in host.peft_order if active != key)
    host.peft_temporary = tuple(other for other in host.peft_temporary if other != key)
    if host.peft_local is not None:
        host.peft_local.known.clear()
    if not host.peft:
        host.__class__ = host._host_class
        del host.peft, host.peft_order
        for name in ("peft_local", "peft_number", "peft_temporary"):
            vars(host).pop(name, None)
