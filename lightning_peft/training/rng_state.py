"""The state of random generators, so that dropout and shuffling go on where they stopped."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist


def random_state() -> dict[str, Any]:
    """Return the state of Python's and torch's random generators, as plain data and tensors."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]  # of the device in use
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def random_states() -> list[dict[str, Any]]:
    """Return the states of all processes by rank; all of them have to ask."""
    if not dist.is_initialized():
        return [random_state()]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, random_state())
    return states


def restore_random_state(states: list[dict[str, Any]]) -> None:
    """Set the generators to what ``random_states`` returned, unless that was in another number of processes."""
    count, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if len(states) != count:
        return
    version, internal, gauss = states[rank]["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states[rank]["torch"].cpu())
    if states[rank]["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())
