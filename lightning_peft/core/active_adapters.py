"""``activate`` and ``disabled``: choose by name which adapters of a model are active, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..structure.base_model import base_parameters, list_base_modules
from .active_on_host import activate_here, inactive
from .active_set import Keys, LocalActiveSet
from .adapted_module import AdaptedModule, adapters, method_name, remove, set_active
from .check_placed import check_placed
from .checks import check_not_paused
from .inject import detach
from .injection_record import InjectionRecord, adapters_of, get_record, methods_named, require_record
from .method import Method
from .shared_hosts import check_shared_host
from .weight_backup import check_not_merged


def active(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that are active in this thread and asyncio task, inner before outer.

    Args:
        model: The module that was given to ``inject`` or ``add_adapter``.

    Raises:
        ValueError: Nothing was injected into this module.

    Examples:
        >>> lp.active(lp.inject(nn.Sequential(nn.Linear(16, 8)), lp.LoRA(targets=["0"])))
        ('lora',)
    """
    return tuple(require_record(model).active)


def activate(model: nn.Module, *names: str) -> nn.Module:
    """Activate the adapters of these names, and no others: y = outer(... inner(host(x))).

    It acts for the thread and asyncio task that call it; where the adapters were injected, and in the main thread
    outside of tasks, it sets what is active in all threads and tasks that have activated nothing themselves, too. So
    a server can activate other adapters for each request, in a pool of threads or in tasks, and results never mix.

    Adapters that are active by default train, the others do not: ``requires_grad`` is a property of parameters, which
    all threads share, so that what a thread activates for itself does not change it. Inactive adapters stay in the
    model and in its checkpoints, and no call spends time on them.

    Args:
        model: The module that was given to ``inject`` or ``add_adapter``.
        names: Names of methods; of two on one host, the later is the outer.

    Returns:
        The model.

    Raises:
        ValueError: A name is unknown, is given twice, or its adapters cannot share a weight with others.
        RuntimeError: Adapters are inactive within ``disabled`` or ``row_adapters``, or merged into the weights.

    Examples:
        >>> model = lp.add_adapter(nn.Sequential(nn.Linear(16, 8)), lp.LoRA(targets=["0"]), name="billing")
        >>> lp.active(model), lp.active(lp.activate(model, "billing"))
        ((), ('billing',))
    """
    record = require_record(model)
    check_not_paused(record)
    by_default, known = record.local.sets_default(), record.local.known.get(names)
    if known is not None and not by_default:
        record.local.set(known)
        return model
    chosen = _choose(model, record, names)
    orders: dict[int, Keys] = {}
    for _, host, key, _ in chosen:
        orders[id(host)] = (*orders.get(id(host), ()), key)
    check_placed(model)
    attached = list(adapters(model))
    if not by_default:
        hosts = {id(host): host for _, host, *_ in attached}
        activate_here(names, [(host, orders.get(number, ())) for number, host in hosts.items()], record.local)
        return model
    active_ids = {id(adapter) for *_, adapter in chosen}
    locals_: set[LocalActiveSet] = {record.local}
    for _, host, _, adapter in attached:
        # Temporary adapters go outermost: they watch or replace the call of the host with all of its adapters.
        set_active(host, orders.get(id(host), ()) + temporary_adapters(host))
        adapter.invalidate_cache()
        adapter.requires_grad_(id(adapter) in active_ids)
        locals_.add(vars(host)["peft_local"])
    for local in locals_:
        local.set(None)
    record.set_default(names)
    return model


def _choose(model: nn.Module, record: InjectionRecord, names: Sequence[str]) -> list[Any]:
    """Return the entries of ``adapters(model)`` that these names mean, inner before outer; raise if they do not fit."""
    methods = [method for name in names for method in methods_named(record, name)]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"activate needs one name or several different ones, got {list(names)}.")
    without_adapters = [m for m in record.methods if m not in methods and not adapters_of(model, m)]
    if always_active := [method.name for method in without_adapters if trained_by(model, [method])]:
        raise ValueError(f"{always_active[0]!r} trains the base itself and cannot be inactive; name it, too.")
    attached = list(adapters(model))
    chosen = [entry for method in methods for entry in attached if method_name(*entry[2:]) == method.name]
    check_shared_host([(name, adapter) for name, _, _, adapter in chosen])
    return chosen


def remove_adapter(model: nn.Module, name: str) -> nn.Module:
    """Remove the adapters of one name from a model; the base and the other adapters stay as they are.

    Once the last adapter is removed, the model is a plain module again, as after ``detach``.

    Args:
        model: The module that was given to ``inject`` or ``add_adapter``.
        name: Name of the method.

    Returns:
        The model.

    Raises:
        ValueError: The name is unknown, or the method trained parameters of the base.
        RuntimeError: Adapters are inactive within ``disabled`` or ``row_adapters``, or merged into the weights.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8)), lp.LoRA(targets=["0"]))
        >>> list(lp.remove_adapter(model, "lora").state_dict())
        ['0.weight', '0.bias']
    """
    record = require_record(model)
    check_not_paused(record)
    methods = methods_named(record, name)
    if changed := trained_by(model, methods):
        raise ValueError(f"{name!r} trains {changed[0]} in the base itself, whose first values are not kept.")
    if len(record.methods) == len(methods) and not record.trained:
        return detach(model)
    for _, host, key, adapter in list(adapters(model)):
        if method_name(key, adapter) in {method.name for method in methods}:
            remove(host, key)
    for _, _, _, adapter in adapters(model):
        adapter.invalidate_cache()
    record.remove(name)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Context in which no adapter is active: the outputs are those of the base, to the bit. Contexts nest.

    It acts for the thread and asyncio task that enter it, and for tasks that these start inside; others go on with
    their adapters. Parts under gradient checkpointing are computed again as they were in forward, wherever backward
    is called.

    Args:
        model: An adapted model, or a part of one.

    Raises:
        ValueError: The model has no adapters, or parameters of the base train, whose first values are not kept.
        RuntimeError: Adapters are merged into the weights, or the context was left in another thread or task.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> x, base = torch.ones(1, 16), model(torch.ones(1, 16))
        >>> _ = lp.inject(model, lp.LoRA(init="orthogonal", targets=["0"]))
        >>> with lp.disabled(model):
        ...     torch.equal(model(x), base)
        True
    """
    check_not_merged(model)
    if (record := get_record(model)) is not None and record.merged is not None:  # with no adapter in the weights
        raise RuntimeError("merge(model, keep=True) was called, so that nothing can change; call unmerge(model) first.")
    if not any(adapters(model)):
        raise ValueError(f"This {type(model).__name__} has no adapters that could be disabled.")
    if trained := [name for name, p in base_parameters(model).items() if p.requires_grad]:
        raise ValueError(
            f"{trained[0]} trains in the base itself, whose first values are not kept: none to go back to."
        )
    with inactive(module for module in list_base_modules(model) if isinstance(module, AdaptedModule)):
        yield


def trained_by(model: nn.Module, methods: Iterable[Method]) -> list[str]:
    """Return the names of base parameters that methods train in place."""
    return sorted({name for m in methods for name in m.parameters(model)} & set(require_record(model).trained))


def temporary_adapters(host: Any) -> tuple[str, ...]:
    """Return the keys of a host's adapters that exist during one run only, such as a probe of the frozen cache."""
    return tuple(key for key in host.peft_order if not host.peft[key].persistent)
