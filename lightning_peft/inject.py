"""What enters a model and leaves it again; every refusal comes before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .adapter import Adapter
from .base import base_modules, base_parameters
from .following import follow, mesh_of, refuse_to_follow
from .hosts import adapters, attach, call_as_before, call_children, key_of, remove, surrounding
from .method import Method
from .methods import OwnParameters
from .quantized_layers import keep_differentiable, refuse_repacked
from .refusals import refuse_company, refuse_host, refuse_names, refuse_training
from .select import literal, select_parameters

Plan = list[tuple[Method, str, Adapter]]  # method, its host's name, what surrounds it
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


def inject(model: nn.Module, method: Method | Sequence[Method], also_train: Sequence[str] = ()) -> nn.Module:
    """Freeze ``model`` and adapt it in place; nothing is changed if anything is wrong.

    Args:
        model: Any module. Its own parameters keep their names, its layers their types.
        method: One method or several; of two on one host, the later is the outer.
        also_train: Patterns or roles of base modules and parameters that train too, such as a new head.

    Returns:
        The model.

    Raises:
        ValueError: A pattern matches nothing, a setting does not fit a layer, or a name is taken.
        TypeError: A host cannot be adapted; the message says what to do instead.
    """
    return _inject(model, [method] if isinstance(method, Method) else list(method), also_train)


def inject_idle(model: nn.Module, methods: Sequence[Method], also_train: Sequence[str] = ()) -> nn.Module:
    """Add adapters under the name of the first method; they take part in no call, and do not train, until activated.

    What would train in the base itself becomes ``OwnParameters``.
    """
    return _inject(model, methods, also_train, takes_part=False)


def _inject(
    model: nn.Module, methods: Sequence[Method], also_train: Sequence[str] = (), takes_part: bool = True
) -> nn.Module:
    base, modules = base_parameters(model), {"": model, **base_modules(model)}
    record = injection(model) or Injection(required_grad={n: p.requires_grad for n, p in base.items()})
    refuse_paused(record)
    plan = [(m, host_name, adapter) for m in methods for host_name, adapter in m.adapters(model)]
    trained = {name for m in methods for name in m.parameters(model)} | set(select_parameters(model, also_train))
    trained -= _replaced((host_name, adapter) for _, host_name, adapter in plan)
    if trained and not takes_part:
        own, found = _own(model, methods[0].name, trained)
        methods, plan, trained = [*methods, own], plan + found, set()
    refuse_names([m.name for m in [*record.methods, *methods]])
    _refuse(model, modules, plan, trained, takes_part)
    if not plan and not trained:
        raise ValueError("Nothing would train: the methods add no adapter and choose no parameter.")

    record.methods += methods
    if takes_part:
        record.active += [m.name for m in methods]
        record.also_train += also_train
    elif len(methods) > 1:
        record.groups[methods[0].name] = [m.name for m in methods]
    trained |= set(record.trained)
    record.trained = [name for name in record.required_grad if name in trained]
    model.__dict__[_RECORD] = record
    for name, parameter in base.items():
        parameter.requires_grad_(name in trained)
    for m, host_name, adapter in plan:
        for p in adapter.parameters():
            p.requires_grad_(p.requires_grad and takes_part)
        attach(modules[host_name], key_of(m.name, adapter), adapter, takes_part)
    if (mesh := mesh_of(model)) is not None:
        follow(model, mesh)
    call_children(modules.values())
    keep_differentiable(modules.values())
    return model


def _own(model: nn.Module, name: str, trained: set[str]) -> tuple[Method, Plan]:
    """Return a method, and its adapters, that has these parameters of its own."""
    method = OwnParameters(name=f"{name}_own", targets=[literal(one) for one in sorted(trained)])
    found = list(method.adapters(model))
    if more := _replaced(found) - trained:
        raise ValueError(f"{min(more)} ends in the name of one that trains and would train, too; rename one of them.")
    return method, [(method, host_name, adapter) for host_name, adapter in found]


def _refuse(
    model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan, trained: set[str], takes_part: bool
) -> None:
    """Raise for what cannot work."""
    refuse_repacked(modules)
    split = mesh_of(model) is not None
    for m, host_name, adapter in plan:
        refuse_host(modules[host_name], host_name, key_of(m.name, adapter), adapter)
        if split:
            refuse_to_follow(modules[host_name], host_name, key_of(m.name, adapter), adapter)
    for name in sorted(trained):
        refuse_training(model, name)
    there = list(surrounding(model)) if takes_part else []
    refuse_company(there + [(n, a) for _, n, a in plan])


def _replaced(found: Iterable[tuple[str, Adapter]]) -> set[str]:
    """Return the names of base parameters that do not train since adapters have others in their place."""
    return {f"{name}.{key}".lstrip(".") for name, adapter in found for key in adapter.replaces}


def injection(model: nn.Module) -> Injection | None:
    """Return the record of what ``inject`` did to this very module."""
    return model.__dict__.get(_RECORD)


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
    return _replaced((host, a) for host, _, key, a in adapters(model) if key in {key_of(name, a) for name in names})


def beside_base(model: nn.Module, methods: Sequence[Method]) -> set[str]:
    """Return the names of parameters that are no part of the base of these methods: they train, or are replaced."""
    trained = {name for name, parameter in base_parameters(model).items() if parameter.requires_grad}
    return trained | replaced_by(model, methods)


def trained_by(model: nn.Module, methods: Iterable[Method]) -> list[str]:
    """Return the names of the base's own parameters that methods train."""
    return sorted({name for m in methods for name in m.parameters(model)} & set(injected(model).trained))


def taking_part(record: Injection) -> list[Method]:
    """Return the methods whose adapters take part in calls."""
    return [method for name in record.active for method in named(record, name)]


def adapters_of(model: nn.Module, *methods: Method) -> dict[str, Adapter]:
    """Return the adapters of methods by host name, with the part of a fused host appended."""
    return {
        f"{name}.{adapter.part}" if adapter.part else name: adapter
        for name, _, key, adapter in adapters(model)
        if any(key == key_of(method.name, adapter) for method in methods)
    }


def detach(model: nn.Module) -> nn.Module:
    """Remove every adapter, restore classes and ``requires_grad``; base parameters that trained keep their values."""
    refuse_paused(injection(model) or Injection())
    for _, host, key, _ in list(adapters(model)):
        remove(host, key)
    for module in model.modules():
        call_as_before(module)
    record: Injection | None = model.__dict__.pop(_RECORD, None)
    for name, parameter in base_parameters(model).items():
        if record is not None:
            parameter.requires_grad_(record.required_grad.get(name, True))
    return model


def refuse_paused(record: Injection) -> None:
    """Raise where adapters cannot be changed now."""
    if record.merged is not None:
        raise RuntimeError("Adapters are merged into the weights and cannot change; call unmerge(model) first.")
    if record.paused:
        raise RuntimeError("Adapters cannot change where they take no part: leave disabled() or row_adapters() first.")
