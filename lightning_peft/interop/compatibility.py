"""Whether a file fits a model, before anything of it is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from ..core.adapter import Adapter
from ..core.method import Method
from .peft_format import Base, File, PeftFormat, State


def check_hosts(base: Base, family: PeftFormat, file: File) -> None:
    """Raise where a file and a model do not have the same hosts."""
    check_known(base, file.state)
    if missing := [name for name in family.expected(base, file) if name not in file.state]:
        raise ValueError(f"The file's settings adapt {missing[:5]}, but it has no tensors of them.")
    if not file.state:
        raise ValueError(
            f"The file has no tensor of a {family.kind} adapter: none ends in {', '.join(family.tensors)}."
        )


def check_known(base: Base, hosts: Collection[str]) -> None:
    """Raise where a file adapts modules that a model has not."""
    known = dict(base.network.named_modules())
    if strange := [name for name in hosts if name not in known]:
        close = difflib.get_close_matches(strange[0], known, n=3)
        raise ValueError(f"The file adapts {strange[:3]}, which the model has not. Close names: {', '.join(close)}.")


def checked(base: Base, method: Method, given: Mapping[str, State], source: str) -> dict[str, State]:
    """Return whole states by host, compared with what the method's adapters will need."""
    states = {}
    for name, adapter in method.adapters(base.model):
        if adapter.state_dict():
            states[name] = _state(adapter, given.get(name, {}), f"{source}: {name}")
    if over := given.keys() - states.keys():
        raise ValueError(f"{source} has tensors of {sorted(over)[:5]}, where {type(method).__name__} has no adapter.")
    return states


def _state(adapter: Adapter, given: State, place: str) -> State:
    state, own = adapter.import_state(given), adapter.state_dict()
    if state.keys() != own.keys():
        raise ValueError(
            f"{place} lacks {sorted(own.keys() - state.keys())}, has too {sorted(state.keys() - own.keys())}."
        )
    for key, value in own.items():
        if state[key].shape != value.shape:
            raise ValueError(f"{place}: {key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}.")
    return state
