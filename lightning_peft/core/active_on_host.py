"""What of a host holds in this thread and task: ``called_adapters``, ``active_keys``, ``current_tensor`` and others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ..ops.sharded_tensors import is_sharded
from .active_set import ActiveSet, Keys, LocalActiveSet
from .adapter import Adapter


def called_adapters(host: Any) -> list[Adapter]:
    """Return the adapters that a call of a host runs in this thread and task, inner before outer."""
    adapters, local = host._modules["peft"]._modules, host.peft_local
    chosen = None if local is None else local.get()
    if chosen is None:
        return list(map(adapters.__getitem__, host.peft_order))  # which is faster than a comprehension
    if local.merged is not None and (chosen.names != local.merged or chosen.paused):
        raise RuntimeError(
            f"{list(local.merged)} were merged into the weights, which all threads share, while {chosen.names} are "
            f"active in this thread or task. Call unmerge(model), or activate(model, ...) after it."
        )
    keys = chosen.keys_on(host) if local.merged is None else ()
    if missing := [key for key in keys if key not in adapters]:
        raise RuntimeError(f"{missing[0]!r} was removed while it was active in this thread or task; activate another.")
    rows = chosen.rows.get(host.peft_number)
    return [*([] if rows is None else [rows]), *[adapters[key] for key in keys]]


def active_keys(host: Any) -> tuple[str, ...]:
    """Return the keys of the adapters of a host that are active in this thread and task, inner before outer."""
    chosen = None if host.peft_local is None else host.peft_local.get()
    return host.peft_order if chosen is None else chosen.keys_on(host)  # type: ignore[no-any-return]


def is_called(host: Any) -> bool:
    """Return whether a call of a host runs any adapter in this thread and task: active ones, or one for each row."""
    chosen = None if host.peft_local is None else host.peft_local.get()
    return bool(active_keys(host)) or (chosen is not None and host.peft_number in chosen.rows)


def persistent_keys(host: Any) -> Keys:
    """Return the same without those of temporary adapters, which exist during one run only."""
    return tuple(key for key in active_keys(host) if host.peft[key].persistent)


def owner_of(host: Any, name: str) -> Adapter | None:
    """Return the active adapter that replaces a parameter or buffer of a host, if there is one."""
    adapters = host._modules["peft"]._modules
    for key in active_keys(host):
        adapter: Adapter | None = adapters.get(key)
        if adapter is not None and name in adapter.replaced_tensors:
            return adapter
    return None


def current_tensor(host: Any, name: str) -> Any:
    """Return the parameter or buffer that a host has in this thread and task: that of an adapter, or its own.

    It is the host's own while FSDP2 stores that as a shard, which FSDP2 alone reads: during calls it is whole.
    """
    parameters = host._parameters
    stored = parameters[name] if name in parameters else host._buffers[name]
    owner = owner_of(host, name)
    return stored if owner is None or is_sharded(stored) else owner.replacement(name, stored)


@contextmanager
def inactive(
    hosts: Iterable[Any], rows: Iterable[tuple[Any, Adapter]] = (), local: LocalActiveSet | None = None
) -> Iterator[None]:
    """Context in which these hosts have no active adapters in this thread and task, except temporary ones.

    Args:
        hosts: Hosts; those of temporary adapters alone are left out.
        rows: Hosts with the adapter that gives each row of a batch its own.
        local: That of the record, which is paused even where it has no hosts.
    """
    hosts_of: dict[LocalActiveSet, list[Any]] = {} if local is None else {local: []}
    for host in hosts:
        if host.peft_local is not None:
            hosts_of.setdefault(host.peft_local, []).append(host)
    with ExitStack() as stack:
        for local, its_hosts in hosts_of.items():
            numbers = {host.peft_number: adapter for host, adapter in rows if host.peft_local is local}
            stack.enter_context(local.during(local.without(its_hosts, numbers)))
        yield


@contextmanager
def active_alone(host: Any, adapter: Adapter) -> Iterator[None]:
    """Context in which one adapter alone is active on a host, in this thread and task; who calls runs the others."""
    key = next(key for key, other in host._modules["peft"]._modules.items() if other is adapter)
    local: LocalActiveSet = host.peft_local
    before = local.get() or ActiveSet(None, complete=False)
    with local.during(dataclasses.replace(before, orders={**before.orders, host.peft_number: (key,)})):
        yield


def activate_here(names: Sequence[str], orders: Iterable[tuple[Any, Keys]], local: LocalActiveSet) -> None:
    """Activate adapters in this thread and task alone.

    Args:
        names: Names of methods and groups.
        orders: Hosts with the keys of their active adapters, inner before outer; others have none.
        local: That of the record; hosts of a model inside of the record's may have another.
    """
    numbers: dict[LocalActiveSet, dict[int, Keys]] = {local: {}}
    for host, keys in orders:
        numbers.setdefault(host.peft_local, {})[host.peft_number] = keys
    sets = {each: ActiveSet(tuple(names), order) for each, order in numbers.items()}
    for each, active_set in sets.items():
        each.set(active_set)
    if len(sets) == 1:
        local.known[tuple(names)] = sets[local]  # so that the next request for these names walks through no module
