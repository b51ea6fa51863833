"""States of random generators, global ones and others, as plain data that JSON can hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

Generator: TypeAlias = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def raw_state() -> tuple[Any, ...]:
    """Return the states of the generators of Python, numpy and torch, and of the CUDA device in use, as they are."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), cuda


def global_state(raw: tuple[Any, ...] | None = None) -> dict[str, Any]:
    """Return these states as plain data; those of now, if none are given."""
    python, (kind, keys, *rest), cpu, cuda = raw or raw_state()
    return {
        "python": _python(python),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _hex(cpu),
        "cuda": None if cuda is None else _hex(cuda),
    }


def set_global_state(state: dict[str, Any]) -> None:
    """Set the generators to what ``global_state`` returned; those that it has no state of stay as they are."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    if "numpy" in state:  # checkpoints of earlier versions have none
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


@contextmanager
def kept_global_state() -> Iterator[None]:
    """Leave the global generators as they were before."""
    state = global_state()
    try:
        yield
    finally:
        set_global_state(state)


def generator_state(generator: Generator) -> Any:
    """Return the state of one generator."""
    if isinstance(generator, torch.Generator):
        return _hex(generator.get_state())
    if isinstance(generator, random.Random):
        return _python(generator.getstate())
    if isinstance(generator, np.random.Generator):
        return _lists(generator.bit_generator.state)
    return _lists(generator.get_state(legacy=False))


def set_generator_state(generator: Generator, state: Any) -> None:
    """Set a generator to what ``generator_state`` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(_tensor(state))
    elif isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _arrays(state)
    else:
        generator.set_state(_arrays(state))


def _python(state: Any) -> list[Any]:
    version, internal, gauss = state
    return [version, list(internal), gauss]


def _hex(state: torch.Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _tensor(state: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)


def _lists(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _lists(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"dtype": str(state.dtype), "values": state.tolist()}
    return state.item() if isinstance(state, np.generic) else state


def _arrays(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if state.keys() == {"dtype", "values"}:
        return np.array(state["values"], dtype=state["dtype"])
    return {key: _arrays(value) for key, value in state.items()}
