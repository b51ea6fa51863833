"""Opening a DataLoader inside an epoch: its sampler is advanced, and nothing is loaded that was seen."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from .worker_random import noticing_random_rows


def is_stateful(loader: Any) -> bool:
    """Whether a loader resumes by itself, by ``state_dict`` and ``load_state_dict``."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def skips_by_sampler(loader: Any) -> bool:
    """Whether the batches of a loader follow from indices alone, which can be left out before anything is loaded."""
    return _is_plain(loader) and not isinstance(loader.dataset, IterableDataset) and not is_stateful(loader)


def has_running_workers(loader: Any) -> bool:
    """Whether a loader's persistent workers were started: its next pass draws no seed for them."""
    return bool(getattr(loader, "persistent_workers", False)) and getattr(loader, "_iterator", None) is not None


def start_workers(loader: Any) -> None:
    """Start persistent workers with nothing to do; that draws the seed which a later pass does not draw."""
    with _Gate(loader) as indices, noticing_random_rows(loader):
        indices.is_open = False
        iter(loader)
        indices.is_open = True


def open_loader(
    loader: Any, skip: int, running: bool, restore_start: Callable[[], None], restore_first: Callable[[], None]
) -> tuple[Iterator[Any], Any, int]:
    """Return the iterator of a pass whose first batches were seen, the last that was drawn again, and their number.

    Args:
        loader: The loader.
        skip: Number of batches that were seen.
        running: Whether persistent workers had been started before this pass.
        restore_start: Sets all generators to where they were before the loader was iterated.
        restore_first: Sets them to where they were before the first batch was fetched.
    """
    if running and _is_plain(loader) and not has_running_workers(loader):
        start_workers(loader)
    restore_start()
    if skips_by_sampler(loader):
        with noticing_random_rows(loader):
            return _open_at(loader, skip, restore_first), None, skip
    batches, last, drawn = iter(loader), None, 0
    restore_first()
    if not is_stateful(loader):
        for drawn, last in enumerate(itertools.islice(batches, skip), 1):  # noqa: B007  # drawn, and dropped
            pass
        return batches, last, drawn
    if inspect.isgenerator(batches):  # it goes to its place, and draws for that, when it is asked for a batch
        batches = itertools.chain(list(itertools.islice(batches, 1)), batches)
    return batches, None, skip


def _open_at(loader: DataLoader[Any], skip: int, restore_first: Callable[[], None]) -> Iterator[Any]:
    indices = getattr(getattr(loader, "_iterator", None), "_index_sampler", None)
    with contextlib.nullcontext(indices) if isinstance(indices, _IndexGate) else _Gate(loader) as gate:
        gate.skip = skip
        batches = iter(loader)
        gate.skip = 0
        restore_first()
        gate.latest.advance()  # only now: a loader draws the seed of its workers before the sampler draws the order
    return batches


def _is_plain(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__


class _IndexGate:
    """Stands before a loader's own batch sampler: lets nothing through while closed, leaves out the first if told so.

    The iterator of persistent workers keeps it; it is then as if it were not there.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.is_open, self.skip = sampler, True, 0
        self.latest = _Indices(iter(()), 0)

    def __iter__(self) -> Iterator[Any]:
        self.latest = _Indices(iter(self.sampler) if self.is_open else iter(()), self.skip)
        return self.latest

    def __len__(self) -> int:
        return len(self.sampler)


class _Indices(Iterator[Any]):
    def __init__(self, indices: Iterator[Any], skip: int) -> None:
        self.indices, self.skip = indices, skip

    def __next__(self) -> Any:
        self.advance()
        return next(self.indices)

    def advance(self) -> None:
        skip, self.skip = self.skip, 0
        for _ in range(skip):
            next(self.indices, None)


class _Gate:
    """Context in which the iterators that a DataLoader makes take their indices through an ``_IndexGate``."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self.indices = _IndexGate(getattr(loader, self.name))

    def __enter__(self) -> _IndexGate:
        self.loader.__dict__[self.name] = self.indices  # a DataLoader refuses setattr, but reads it from here
        return self.indices

    def __exit__(self, *_: object) -> None:
        self.loader.__dict__[self.name] = self.indices.sampler
