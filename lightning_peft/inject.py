"""What enters a model and leaves it again; every refusal comes before anything is changed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .adapter import Adapter, WeightUpdate
from .base import SLOT, base_modules, base_parameters
from .following import follow, is_split, mesh_of, refuse_to_follow
from .hosts import Adapted, adapters, attach, call_as_before, call_children, remove
from .method import Method
from .quantized_layers import is_quantized, keep_differentiable, refuse_repacked
from .select import select_parameters

_RECORD = "_peft_injection"


@dataclass
class Injection:
    """What was injected into a model; lives on its root."""

    methods: list[Method] = field(default_factory=list)
    also_train: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)  # names of base parameters that train
    required_grad: dict[str, bool] = field(default_factory=dict)  # of base parameters, before
    fresh: bool = True  # whether nothing was trained or loaded yet
    shows_base: bool = False  # whether state_dict() holds the frozen base although it is hooked to leave it out


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
    methods = [method] if isinstance(method, Method) else list(method)
    base = base_parameters(model)
    record = injection(model) or Injection(required_grad={n: p.requires_grad for n, p in base.items()})
    names = Counter(m.name for m in [*record.methods, *methods])
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"Two methods are named {twice[0]!r}; give one of them another name.")
    modules = {"": model, **base_modules(model)}
    plan = [(m, host_name, adapter) for m in methods for host_name, adapter in m.adapters(model)]
    trained = {name for m in methods for name in m.parameters(model)} | set(select_parameters(model, also_train))
    refuse_repacked(modules)
    mesh = mesh_of(model)
    for m, host_name, adapter in plan:
        _refuse(modules[host_name], host_name, _key(m.name, adapter), adapter)
        if mesh is not None:
            refuse_to_follow(modules[host_name], host_name, _key(m.name, adapter), adapter)
    for name in sorted(trained):
        owner, _, key = name.rpartition(".")
        quantized = key == "weight" and is_quantized(model.get_submodule(owner))
        if quantized or not model.get_parameter(name).is_floating_point():
            raise TypeError(f"{name} is stored in few bits and cannot train; leave it out, or dequantize it.")
    _refuse_company([(n, a) for n, *_, a in adapters(model)] + [(n, a) for _, n, a in plan])
    if not plan and not trained:
        raise ValueError("Nothing would train: the methods add no adapter and choose no parameter.")

    record.methods += methods
    record.also_train += also_train
    trained |= set(record.trained)
    record.trained = [name for name in record.required_grad if name in trained]
    model.__dict__[_RECORD] = record
    for name, parameter in base.items():
        parameter.requires_grad_(name in trained)
    for m, host_name, adapter in plan:
        attach(modules[host_name], _key(m.name, adapter), adapter)
    if mesh is not None:
        follow(model, mesh)
    call_children(modules.values())
    keep_differentiable(modules.values())
    return model


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


def adapters_of(model: nn.Module, method: Method) -> dict[str, Adapter]:
    """Return the adapters of one method by host name, with the part of a fused host appended."""
    return {
        f"{name}.{adapter.part}" if adapter.part else name: adapter
        for name, _, key, adapter in adapters(model)
        if key == _key(method.name, adapter)
    }


def detach(model: nn.Module) -> nn.Module:
    """Remove every adapter, restore classes and ``requires_grad``; base parameters that trained keep their values."""
    for _, host, key, _ in list(adapters(model)):
        remove(host, key)
    for module in model.modules():
        call_as_before(module)
    record: Injection | None = model.__dict__.pop(_RECORD, None)
    for name, parameter in base_parameters(model).items():
        if record is not None:
            parameter.requires_grad_(record.required_grad.get(name, True))
    return model


def _key(name: str, adapter: Adapter) -> str:
    return f"{name}_{adapter.part}" if adapter.part else name


def _refuse(host: nn.Module, name: str, key: str, adapter: Adapter) -> None:
    """Raise if an adapter on this host could not work; each case fails silently without this check."""
    kind = type(host).__name__
    shows = type(adapter).updated_whole is not Adapter.updated_whole
    if isinstance(host, nn.modules.linear.NonDynamicallyQuantizableLinear) and not shows:
        raise TypeError(
            f"{name} belongs to nn.MultiheadAttention, which reads its weight and never calls it; target other layers."
        )
    if isinstance(host, (nn.ModuleList, nn.ModuleDict)) or type(host).forward is nn.Module.forward:
        raise TypeError(f"{name} is a {kind}, which is never called; target the modules inside.")
    if isinstance(host, torch.jit.ScriptModule):
        raise TypeError(
            f"{name} is a ScriptModule, whose calls cannot be surrounded; adapt the module before scripting."
        )
    if "forward" in vars(host):
        raise TypeError(f"forward of {name} was replaced on the instance, which hides any adapter; inject before that.")
    if any(isinstance(p, DTensor) for part in host.modules() if not is_split(part) for p in part._parameters.values()):
        raise TypeError(f"{name} is sharded already, so adapters would train on each rank alone; inject, then shard.")
    if not isinstance(host, Adapted) and hasattr(host, SLOT):
        raise TypeError(f"{name} has an attribute {SLOT!r} of its own, where its adapters would live.")
    if isinstance(host, Adapted) and key in host.peft:
        raise ValueError(f"{name} already has an adapter {key!r}; give the method another name.")


def _refuse_company(found: Sequence[tuple[str, Adapter]]) -> None:
    """Raise where an adapter that rewrites rows of a weight as a whole would share them."""
    updates = defaultdict[str, list[Adapter]](list)
    for name, adapter in found:
        if isinstance(adapter, WeightUpdate):
            updates[name].append(adapter)
    for name, adapter in [(n, a) for n, a in found if a.alone]:
        company = [a for a in updates[name] if a is not adapter]
        others = [a for a in company if "" in (a.part, adapter.part) or a.part == adapter.part]
        if others:
            raise ValueError(
                f"{type(adapter).__name__} at {name} rewrites the whole weight and cannot share it with "
                f"{type(others[0]).__name__}; give the methods different targets."
            )
