"""``RngResume``: random generators in checkpoints, so that dropout and shuffling resume where they stopped."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist


class RngResume:
    """Returns the states of the random generators for a checkpoint, and sets them when training resumes."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, until training has started from it
        self._mid_epoch = self._fits = False

    def start_fit(self) -> None:
        """Set the generators before the first data loader draws its seed."""
        self._fits = True
        if self._loaded is not None:
            restore_random_state(self._loaded)

    def start_training(self) -> None:
        """Set them again for a checkpoint from inside an epoch: the run that wrote it had its data loader by then."""
        if self._loaded is not None and self._loaded.get("mid_epoch"):
            restore_random_state(self._loaded)
        self._loaded = None

    def end_batch(self, is_last: bool) -> None:
        """Note whether the epoch goes on after this batch."""
        self._mid_epoch = not is_last

    def end_fit(self) -> None:
        """Note that a checkpoint that is loaded from now on is not resumed at once."""
        self._fits = False

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all processes' generators; all processes have to call it."""
        return {"states": random_states(), "mid_epoch": self._mid_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._loaded = state_dict
        if self._fits:  # strategies that shard load after on_fit_start
            restore_random_state(state_dict)


def random_states() -> list[dict[str, Any]]:
    """Return the states of Python's and torch's generators, by rank; all processes have to call it."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]  # of the device in use
    state = {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}
    if not dist.is_initialized():
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def restore_random_state(loaded: dict[str, Any]) -> None:
    """Set the generators to what was loaded, if the number of processes is the same."""
    states: list[dict[str, Any]] = loaded["states"]
    count, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if len(states) != count:
        return
    version, internal, gauss = states[rank]["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states[rank]["torch"].cpu())
    if states[rank]["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())
