"""What decides the rows of a loader beside the global generators: generators and counters of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from .index_gate import is_stateful
from .random_state import GENERATORS, Generator, generator_state, set_generator_state

_DEPTH = 5  # loader, dataset, dataset below, transform, generator
_LONGEST = 64  # lists of data are not searched
_MOST = 2000  # parts of one loader
_NUMBERS = (int, float, bool, str, type(None))


def generator_states(loader: Any) -> dict[str, Any]:
    """Return the states of the generators that a loader, its samplers and its dataset hold, by where they are."""
    return {path: generator_state(generator) for path, generator in generators_of(loader)}


def set_generator_states(loader: Any, states: dict[str, Any]) -> None:
    """Set the generators that are found again to what ``generator_states`` returned."""
    for path, generator in generators_of(loader):
        if path in states and type(states[path]) is type(generator_state(generator)):
            set_generator_state(generator, states[path])


def counters(loader: Any) -> dict[str, Any]:
    """Return the plain attributes of samplers and iterable datasets; a map-style dataset has no say in what is next."""
    return {
        f"{path}.{name}": value
        for path, part in _parts(loader)
        if isinstance(part, (Sampler, IterableDataset))
        for name, value in getattr(part, "__dict__", {}).items()
        if type(value) in _NUMBERS
    }


def changed_counters(loader: Any, first: dict[str, Any]) -> dict[str, Any]:
    """Return the counters that training changed since ``first``, and seeds that Lightning has given.

    What the program gives a sampler stays as the program gives it.
    """
    seeds = {f"{path}.seed" for path, part in _parts(loader) if isinstance(part, DistributedSampler)}
    now = counters(loader)
    return {path: value for path, value in now.items() if path in seeds or first.get(path, value) != value}


def set_counters(loader: Any, values: dict[str, Any]) -> None:
    """Set the counters that are found again to what ``changed_counters`` returned."""
    for path, part in list(_parts(loader)):
        for name in list(getattr(part, "__dict__", {})):
            if f"{path}.{name}" in values and type(getattr(part, name)) in _NUMBERS:
                setattr(part, name, values[f"{path}.{name}"])


def generators_of(loader: Any) -> Iterator[tuple[str, Generator]]:
    """Yield the generators that a loader, its samplers and its dataset hold, with where they are."""
    return ((path, part) for path, part in _parts(loader) if isinstance(part, GENERATORS))


def _parts(loader: Any) -> Iterator[tuple[str, Any]]:
    """Yield the loader's parts, those of its samplers and of its dataset, once each, with the path to them."""
    seen: set[int] = set()
    waiting = [] if is_stateful(loader) and not isinstance(loader, DataLoader) else [("", loader, 0)]  # it knows itself
    while waiting and len(seen) < _MOST:
        path, part, depth = waiting.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield path, part
        if depth < _DEPTH and not isinstance(part, GENERATORS):
            waiting += [(f"{path}.{name}", below, depth + 1) for name, below in _below(part)]


def _below(part: Any) -> list[tuple[str, Any]]:
    if isinstance(part, (list, tuple, dict)):
        if len(part) > _LONGEST:
            return []
        items = part.items() if isinstance(part, dict) else enumerate(part)
        return [(str(name), value) for name, value in items if _is_part(value)]
    return [(name, value) for name, value in sorted(getattr(part, "__dict__", {}).items()) if _is_part(value)]


def _is_part(value: Any) -> bool:
    """Whether generators may lie in a value: a container, or an object of a class that keeps attributes."""
    if isinstance(value, (*GENERATORS, list, tuple, dict)):
        return True
    if isinstance(value, (Tensor, nn.Module, type)) or type(value).__module__ == "builtins":
        return False
    return hasattr(value, "__dict__")
