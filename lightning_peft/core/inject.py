"""What enters a model and leaves it again; every refusal comes before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..structure.base_model import base_modules, base_parameters
from ..structure.quantized import check_not_repacked, keep_differentiable
from ..structure.selection import literal, select_parameters
from .adapted_module import active_adapters, adapter_key, adapters, attach, disable_fast_path, remove, restore_fast_path
from .adapter import Adapter
from .checks import check_host, check_names, check_shared_host, check_trainable
from .injection_record import InjectionRecord, check_not_paused, get_record, replaced_names, set_record
from .method import Method
from .own_parameters import OwnParameters
from .tensor_parallel import check_tensor_parallel_support, mesh_of, shard_adapters

Plan = list[tuple[Method, str, Adapter]]  # method, its host's name, what surrounds it


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


def add_inactive(model: nn.Module, methods: Sequence[Method], also_train: Sequence[str] = ()) -> nn.Module:
    """Add adapters under the name of the first method; they take part in no call, and do not train, until activated.

    What would train in the base itself becomes ``OwnParameters``.
    """
    return _inject(model, methods, also_train, takes_part=False)


def _inject(
    model: nn.Module, methods: Sequence[Method], also_train: Sequence[str] = (), takes_part: bool = True
) -> nn.Module:
    base, modules = base_parameters(model), {"": model, **base_modules(model)}
    record = get_record(model) or InjectionRecord(required_grad={n: p.requires_grad for n, p in base.items()})
    check_not_paused(record)
    plan = [(m, host_name, adapter) for m in methods for host_name, adapter in m.adapters(model)]
    trained = {name for m in methods for name in m.parameters(model)} | set(select_parameters(model, also_train))
    trained -= replaced_names((host_name, adapter) for _, host_name, adapter in plan)
    if trained and not takes_part:
        own, found = _own(model, methods[0].name, trained)
        methods, plan, trained = [*methods, own], plan + found, set()
    check_names([m.name for m in [*record.methods, *methods]])
    _check_plan(model, modules, plan, trained, takes_part)
    if not plan and not trained:
        raise ValueError("Nothing would train: the methods add no adapter and choose no parameter.")

    record.methods += methods
    if takes_part:
        record.active += [m.name for m in methods]
        record.also_train += also_train
    elif len(methods) > 1:
        record.method_groups[methods[0].name] = [m.name for m in methods]
    trained |= set(record.trained)
    record.trained = [name for name in record.required_grad if name in trained]
    set_record(model, record)
    _apply_plan(model, modules, plan, trained, takes_part)
    return model


def _apply_plan(
    model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan, trained: set[str], takes_part: bool
) -> None:
    """Freeze the base but for what trains, and put adapters in."""
    for name, parameter in base_parameters(model).items():
        parameter.requires_grad_(name in trained)
    for m, host_name, adapter in plan:
        for p in adapter.parameters():
            p.requires_grad_(p.requires_grad and takes_part)
        attach(modules[host_name], adapter_key(m.name, adapter), adapter, takes_part)
    if (mesh := mesh_of(model)) is not None:
        shard_adapters(model, mesh)
    disable_fast_path(modules.values())
    keep_differentiable(modules.values())


def _own(model: nn.Module, name: str, trained: set[str]) -> tuple[Method, Plan]:
    """Return a method, and its adapters, that has these parameters of its own."""
    method = OwnParameters(name=f"{name}_own", targets=[literal(one) for one in sorted(trained)])
    found = list(method.adapters(model))
    if more := replaced_names(found) - trained:
        raise ValueError(f"{min(more)} ends in the name of one that trains and would train, too; rename one of them.")
    return method, [(method, host_name, adapter) for host_name, adapter in found]


def _check_plan(
    model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan, trained: set[str], takes_part: bool
) -> None:
    """Raise for what cannot work."""
    check_not_repacked(modules)
    split = mesh_of(model) is not None
    for m, host_name, adapter in plan:
        check_host(modules[host_name], host_name, adapter_key(m.name, adapter), adapter)
        if split:
            check_tensor_parallel_support(modules[host_name], host_name, adapter_key(m.name, adapter), adapter)
    for name in sorted(trained | replaced_names((host_name, adapter) for _, host_name, adapter in plan)):
        check_trainable(model, name)
    there = list(active_adapters(model)) if takes_part else []
    check_shared_host(there + [(n, a) for _, n, a in plan])


def detach(model: nn.Module) -> nn.Module:
    """Remove every adapter, restore classes and ``requires_grad``; base parameters that trained keep their values."""
    check_not_paused(get_record(model) or InjectionRecord())
    for _, host, key, _ in list(adapters(model)):
        remove(host, key)
    for module in model.modules():
        restore_fast_path(module)
    if (record := get_record(model)) is not None:
        for name, parameter in base_parameters(model).items():
            parameter.requires_grad_(record.required_grad.get(name, True))
        set_record(model, None)
    return model
