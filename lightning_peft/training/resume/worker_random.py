"""``RandomRows``: notices rows that worker processes make with random numbers, which a resumed run cannot repeat."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info


class RandomRows:
    """Stands for a loader's ``collate_fn`` in workers, and notes whether their first rows drew random numbers."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate, self._looked = collate, False
        self._found = torch.zeros(1).share_memory_()  # type: ignore[no-untyped-call]  # seen by the process that trains

    def __call__(self, rows: Any) -> Any:
        if not self._looked and get_worker_info() is not None:
            self._looked = True
            seed = torch.initial_seed()  # of this worker, for Python and torch
            drew = not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
            if drew or random.getstate() != random.Random(seed).getstate() or _numpy_drew():  # noqa: S311
                self._found.fill_(1)
        return self.collate(rows)

    def warn(self) -> None:
        """Say once what was noticed."""
        if self._found.item():
            self._found.fill_(0)
            warnings.warn(
                "This run does not go on exactly: the train loader's workers draw random numbers for their rows. The "
                "rows are those of an undisturbed run, their random numbers are not; with num_workers=0 they are.",
                stacklevel=2,
            )


@contextmanager
def noticing_random_rows(loader: Any) -> Iterator[None]:
    """Context in which the workers that a DataLoader starts notice random rows."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0 or isinstance(loader.collate_fn, RandomRows):
        yield
        return
    own, loader.collate_fn = loader.collate_fn, RandomRows(loader.collate_fn)
    try:
        yield
    finally:
        loader.collate_fn = own


def warn_of_random_rows(batches: Any) -> None:
    """Say it if the workers of an iterator have noticed random rows."""
    if isinstance(collate := getattr(batches, "_collate_fn", None), RandomRows):
        collate.warn()


def _numpy_drew() -> bool:
    """Whether numpy's generator has moved on in its block of numbers; a worker that was just seeded is at its end."""
    _, _, position, *_ = np.random.get_state(legacy=True)
    return bool(position != 624)
