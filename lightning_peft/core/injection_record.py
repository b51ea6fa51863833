"""What was injected into a model, and what can be asked about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..structure.base_model import base_parameters
from .adapted_module import adapters, method_name
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
class InjectionRecord:
    """What was injected into a model; lives on its root."""

    methods: list[Method] = field(default_factory=list)
    also_train: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)  # names of base parameters that train
    required_grad: dict[str, bool] = field(default_factory=dict)  # of base parameters, before
    active: list[str] = field(default_factory=list)  # names of the methods whose adapters take part, inner before outer
    method_groups: dict[str, list[str]] = field(default_factory=dict)  # names of methods that go under the name of one
    paused: bool = False  # whether no adapter takes part for now, whatever is active
    merged: Merged | None = None  # where those that are active are in the base's weights for now
    untrained: bool = True  # whether nothing was trained or loaded yet
    shows_base: bool = False  # whether state_dict() holds the frozen base although it is hooked to leave it out

    @property
    def switched(self) -> bool:
        """Whether adapters lie idle, were put into another order, or share a name."""
        return bool(self.method_groups) or self.active != [method.name for method in self.methods]


def get_record(model: nn.Module) -> InjectionRecord | None:
    """Return the record of what ``inject`` did to this very module."""
    return model.__dict__.get(_RECORD)


def set_record(model: nn.Module, record: InjectionRecord | None) -> None:
    """Give a model a record; None takes it away."""
    if record is None:
        model.__dict__.pop(_RECORD, None)
    else:
        model.__dict__[_RECORD] = record


def require_record(model: nn.Module) -> InjectionRecord:
    """Return that record; a ``ValueError`` where there is none."""
    record = get_record(model)
    if record is None:
        raise ValueError(
            f"Nothing was injected into this {type(model).__name__}; pass the very module given to inject."
        )
    return record


def methods_named(record: InjectionRecord, name: str) -> list[Method]:
    """Return the methods that go under a name; a ``ValueError`` where there is none."""
    inside = {other for names in record.method_groups.values() for other in names[1:]}
    known = [method.name for method in record.methods if method.name not in inside]
    if name not in known:
        raise ValueError(f"This model has no adapter named {name!r}; it has {', '.join(map(repr, known))}.")
    return [method for method in record.methods if method.name in record.method_groups.get(name, [name])]


def names_replaced_by(model: nn.Module, methods: Sequence[Method]) -> set[str]:
    """Return the names of the base's parameters that adapters of these methods take the place of."""
    names = {method.name for method in methods}
    return replaced_names(
        (host, adapter) for host, _, key, adapter in adapters(model) if method_name(key, adapter) in names
    )


def trained_or_replaced_names(model: nn.Module, methods: Sequence[Method]) -> set[str]:
    """Return the names of parameters that are no part of the base of these methods: they train, or are replaced."""
    trained = {name for name, parameter in base_parameters(model).items() if parameter.requires_grad}
    return trained | names_replaced_by(model, methods)


def trained_by(model: nn.Module, methods: Iterable[Method]) -> list[str]:
    """Return the names of the base's own parameters that methods train."""
    return sorted({name for m in methods for name in m.parameters(model)} & set(require_record(model).trained))


def methods_in_same_group(record: InjectionRecord, method: Method) -> list[Method]:
    """Return the methods that go under one name with this one; for those without such a name, all others without."""
    inside = {other: first for first, names in record.method_groups.items() for other in names}
    return [other for other in record.methods if inside.get(other.name) == inside.get(method.name)]


def active_methods(record: InjectionRecord) -> list[Method]:
    """Return the methods whose adapters take part in calls."""
    return [method for name in record.active for method in methods_named(record, name)]


def adapters_of(model: nn.Module, *methods: Method) -> dict[str, Adapter]:
    """Return the adapters of methods by host name, with the part of a fused host appended."""
    names = {method.name for method in methods}
    return {
        f"{name}.{adapter.part}" if adapter.part else name: adapter
        for name, _, key, adapter in adapters(model)
        if method_name(key, adapter) in names
    }


def replaced_names(found: Iterable[tuple[str, Adapter]]) -> set[str]:
    """Return the names of base parameters that do not train since adapters have others in their place."""
    return {f"{name}.{key}".lstrip(".") for name, adapter in found for key in adapter.replaces}


def check_not_paused(record: InjectionRecord) -> None:
    """Raise where adapters cannot be changed now."""
    if record.merged is not None:
        raise RuntimeError("Adapters are merged into the weights and cannot change; call unmerge(model) first.")
    if record.paused:
        raise RuntimeError("Adapters cannot change where they take no part: leave disabled() or row_adapters() first.")
