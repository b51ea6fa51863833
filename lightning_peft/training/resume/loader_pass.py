"""``LoaderPass``: one loader of an epoch, with where its pass began and how many of its batches were seen."""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .index_gate import has_running_workers, is_stateful, open_loader, skips_by_sampler
from .loader_state import changed_counters, generator_states, set_counters, set_generator_states
from .random_state import global_state, set_global_state
from .worker_random import warn_of_random_rows


@dataclass(frozen=True)
class Place:
    """A place in a pass over a loader.

    Args:
        start: States of all generators, and counters, before the loader was iterated; None if they are unknown.
        first: States of all generators before the first batch was fetched, which a sampler may draw its order from.
        seen: Number of batches that were seen.
        running: Whether persistent workers ran before the pass.
        last: The last batch that was seen, if the loader has to be asked for it again when training resumes.
        checksum: The checksum of that batch, of a place that was saved.
    """

    start: dict[str, Any] | None
    first: dict[str, Any] | None
    seen: int
    running: bool
    last: Any = None
    checksum: int | None = None

    def saved(self) -> dict[str, Any]:
        """Return the place as plain data."""
        check = self.checksum if self.last is None else checksum(self.last)
        return {
            "start": self.start, "first": self.first, "seen": self.seen, "running": self.running, "checksum": check,
        }  # fmt: skip


def random_states(loader: Any) -> dict[str, Any]:
    """Return the states of the global generators and of a loader's own."""
    return {"random": global_state(), "generators": generator_states(loader)}


def set_random_states(loader: Any, states: dict[str, Any] | None) -> None:
    """Set them to what ``random_states`` returned, and counters, if there are some."""
    if states is not None:
        set_counters(loader, states.get("counters", {}))
        set_global_state(states["random"])
        set_generator_states(loader, states["generators"])


class LoaderPass:
    """Iterates over a loader, from its beginning or from a place.

    Args:
        loader: The loader.
        counters: Counters of the loader before its first pass.
        place: Where to begin.
        is_over: Whether nothing comes, and the loader is not asked.
    """

    def __init__(
        self, loader: Any, counters: dict[str, Any], place: Place | None = None, is_over: bool = False
    ) -> None:
        self.loader, self.counters, self.is_over = loader, counters, is_over
        self.place = place or Place(None, None, 0, False)
        self._resumes = place is not None
        self._keeps_last = not skips_by_sampler(loader) and not is_stateful(loader)
        self._batches: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        resumes, self._resumes = self._resumes, False
        if self.is_over:
            return iter(())
        if resumes:
            self._resume(self.place)
        else:
            start = {**random_states(self.loader), "counters": changed_counters(self.loader, self.counters)}
            self.place = Place(start, None, 0, has_running_workers(self.loader))
            self._batches = iter(self.loader)
        return self

    def __next__(self) -> Any:
        first = self.place.first or random_states(self.loader)
        batch = next(self._batches)
        warn_of_random_rows(self._batches)
        last = batch if self._keeps_last else None
        self.place = replace(self.place, first=first, seen=self.place.seen + 1, last=last)
        return batch

    def close(self) -> None:
        """Let go of the loader's iterator, and with it of its worker processes."""
        self._batches = iter(())

    def _resume(self, place: Place) -> None:
        restores = [functools.partial(set_random_states, self.loader, states) for states in (place.start, place.first)]
        self._batches, last, dropped = open_loader(self.loader, place.seen, place.running, *restores)
        self.place = replace(place, last=last)
        if dropped < place.seen:
            warnings.warn(
                f"{type(self.loader).__name__} ended after {dropped} batches, but the run that wrote the checkpoint "
                f"had seen {place.seen} of this epoch. Resume with the same data to go on exactly.",
                stacklevel=2,
            )
        elif last is not None and place.checksum not in (None, checksum(last)):
            warnings.warn(
                f"{type(self.loader).__name__} returned another batch {place.seen} than in the run that wrote the "
                f"checkpoint, so rows of this epoch may come twice or not at all. Have its dataset return the same "
                f"rows in each run, or give the loader state_dict and load_state_dict.",
                stacklevel=2,
            )


def checksum(batch: Any) -> int:
    """Return a checksum of all tensors, arrays, numbers and strings of a batch."""
    value = 0
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_meta:
            leaf = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        if isinstance(leaf, np.ndarray) and leaf.dtype != object:
            value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
        elif isinstance(leaf, (int, float, str, bytes)):
            value = zlib.crc32(repr(leaf).encode(), value)
    return value
