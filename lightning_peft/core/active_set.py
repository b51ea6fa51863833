"""``ActiveSet``: the adapters that a thread or asyncio task has activated; ``LocalActiveSet`` holds it for each."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .scoped import Scoped

Keys = tuple[str, ...]


@dataclass(frozen=True)
class ActiveSet:
    """Active adapters, in place of those that are active by default.

    Args:
        names: Names of the active methods and groups; None for those that are active by default.
        orders: Keys of the active adapters of a host, inner before outer, by the host's number.
        complete: Whether hosts that ``orders`` leaves out have no active adapter; else they have those of the default.
        rows: Adapter that gives each row of a batch its own, by the host's number.
        paused: Whether this is inside of ``disabled`` or ``row_adapters``.
    """

    names: Keys | None
    orders: Mapping[int, Keys] = field(default_factory=dict)
    complete: bool = True
    rows: Mapping[int, Any] = field(default_factory=dict)
    paused: bool = False

    def keys_on(self, host: Any) -> Keys:
        """Return the keys of a host's active adapters, those that exist during one run only included."""
        keys = self.orders.get(host.peft_number)
        if keys is None:
            keys = () if self.complete else host.peft_order
        # Temporary adapters go outermost: they watch or replace the call of the host with all of its adapters. What is
        # active by default is not read here, so that compiled code does not depend on it.
        return (*keys, *[key for key in host.peft_temporary if key not in keys])


class LocalActiveSet(Scoped[ActiveSet]):
    """The ``ActiveSet`` of each thread and task, for the hosts of one injection, which share this object.

    Threads and tasks without one have the adapters that are active by default: those in ``peft_order`` of the hosts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hosts = 0  # how many have got a number
        self.merged: Keys | None = None  # names of the adapters that are merged into the weights
        self.known: dict[Keys, ActiveSet] = {}  # checked sets by their names, until adapters are added or removed
        self._owner = _current()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.hosts, self.merged)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalActiveSet:
        twin = _restore(self.hosts, self.merged)
        outermost = self.outermost()
        if outermost is not None and not outermost.paused:
            twin.set(copy.copy(outermost))
        return twin

    def sets_default(self) -> bool:
        """Return whether what is activated here is active by default, and not in this thread and task alone.

        Cells of a notebook are tasks of the main thread, each another one.
        """
        thread, task = _current()
        in_main = thread() is threading.main_thread() and (task is None or "ipykernel" in sys.modules)
        return in_main or (thread, task) == self._owner

    def number_for(self) -> int:
        """Return a number for a host."""
        self.hosts += 1
        return self.hosts

    def without(self, hosts: Iterable[Any], rows: Mapping[int, Any]) -> ActiveSet:
        """Return the set of now in which these hosts have no active adapters but, by their numbers, those of rows."""
        before = self.get() or ActiveSet(None, complete=False)
        inactive = {host.peft_number: () for host in hosts}
        kept = {number: adapter for number, adapter in before.rows.items() if number not in inactive}
        return dataclasses.replace(before, orders={**before.orders, **inactive}, rows={**kept, **rows}, paused=True)


def _restore(hosts: int, merged: Keys | None) -> LocalActiveSet:
    local = LocalActiveSet()
    local.hosts, local.merged = hosts, merged
    return local


def _current() -> tuple[weakref.ref[threading.Thread], weakref.ref[Any] | None]:
    """Return references to this thread and to its asyncio task."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs
        task = None
    return weakref.ref(threading.current_thread()), None if task is None else weakref.ref(task)
