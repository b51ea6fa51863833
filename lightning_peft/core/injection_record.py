"""What was injected into a model, and what can be asked about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..structure.base_model import base_parameters
from .adapted_module import adapters, name_of
from .adapter import Adapter
from .method import Method

_RECORD = "_peft_injection"


@dataclass(frozen=True)
class Merged:
    """Fingerprints of a base without and with the adapters that are merged into it for now, and what is beside it."""

    base: str | None
    now: str | None
    beside: set[str]


@dataclass
class Injection:
    """What was injected into a model; lives on its root."""

    methods: list[Method] = field(default_factory=list)
    also_train: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)  # names of base parameters that train
    required_grad: dict[str, bool] = field(default_factory=dict)  # of base parameters, before
    active: list[str] = field(default_factory=list)  # names of the methods whose adapters take part, inner before outer
    groups: dict[str, list[str]] = field(default_factory=dict)  # names of methods that go under the name of one
    paused: bool = False  # whether no adapter takes part for now, whatever is active
    merged: Merged | None = None  # where those that are active are in the base's weights for now
    fresh: bool = True  # whether nothing was trained or loaded yet
    shows_base: bool = False  # whether state_dict() holds the frozen base although it is hooked to leave it out

    @property
    def switched(self) -> bool:
        """Whether adapters lie idle, were put into another order, or share a name."""
        return bool(self.groups) or self.active != [method.name for method in self.methods]


def injection(model: nn.Module) -> Injection | None:
    """Return the record of what ``inject`` did to this very module."""
    return model.__dict__.get(_RECORD)


def note(model: nn.Module, record: Injection | None) -> None:
    """Give a model a record; None takes it away."""
    if record is None:
        model.__dict__.pop(_RECORD, None)
    else:
        model.__dict__[_RECORD] = record


def injected(model: nn.Module) -> Injection:
    """Return that record; a ``ValueError`` where there is none."""
    record = injection(model)
    if record is None:
        raise ValueError(
            f"Nothing was injected into this {type(model).__name__}; pass the very module given to inject."
        )
    return record


def named(record: Injection, name: str) -> list[Method]:
    """Return the methods that go under a name; a ``ValueError`` where there is none."""
    inside = {other for names in record.groups.values() for other in names[1:]}
    known = [method.name for method in record.methods if method.name not in inside]
    if name not in known:
        raise ValueError(f"This model has no adapter named {name!r}; it has {', '.join(map(repr, known))}.")
    return [method for method in record.methods if method.name in record.groups.get(name, [name])]


def replaced_by(model: nn.Module, methods: Sequence[Method]) -> set[str]:
    """Return the names of the base's parameters that adapters of these methods take the place of."""
    names = {method.name for method in methods}
    return replaced((host, adapter) for host, _, key, adapter in adapters(model) if name_of(key, adapter) in names)


def beside_base(model: nn.Module, methods: Sequence[Method]) -> set[str]:
    """Return the names of parameters that are no part of the base of these methods: they train, or are replaced."""
    trained = {name for name, parameter in base_parameters(model).items() if parameter.requires_grad}
    return trained | replaced_by(model, methods)


def trained_by(model: nn.Module, methods: Iterable[Method]) -> list[str]:
    """Return the names of the base's own parameters that methods train."""
    return sorted({name for m in methods for name in m.parameters(model)} & set(injected(model).trained))


def company(record: Injection, method: Method) -> list[Method]:
    """Return the methods that go under one name with this one; for those without such a name, all others without."""
    inside = {other: first for first, names in record.groups.items() for other in names}
    return [other for other in record.methods if inside.get(other.name) == inside.get(method.name)]


def taking_part(record: Injection) -> list[Method]:
    """Return the methods whose adapters take part in calls."""
    return [method for name in record.active for method in named(record, name)]


def adapters_of(model: nn.Module, *methods: Method) -> dict[str, Adapter]:
    """Return the adapters of methods by host name, with the part of a fused host appended."""
    names = {method.name for method in methods}
    return {
        f"{name}.{adapter.part}" if adapter.part else name: adapter
        for name, _, key, adapter in adapters(model)
        if name_of(key, adapter) in names
    }


def replaced(found: Iterable[tuple[str, Adapter]]) -> set[str]:
    """Return the names of base parameters that do not train since adapters have others in their place."""
    return {f"{name}.{key}".lstrip(".") for name, adapter in found for key in adapter.replaces}


def refuse_paused(record: Injection) -> None:
    """Raise where adapters cannot be changed now."""
    if record.merged is not None:
        raise RuntimeError("Adapters are merged into the weights and cannot change; call unmerge(model) first.")
    if record.paused:
        raise RuntimeError("Adapters cannot change where they take no part: leave disabled() or row_adapters() first.")
