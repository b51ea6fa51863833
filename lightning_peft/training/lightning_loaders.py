"""What exact resuming trusts of Lightning's combined loaders and their fetchers, all private: asked for here alone.

A test says in words what a release no longer has.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Watch(Protocol):
    """What is told of a combined loader's passes."""

    def open(self, combined: Any, original: Callable[[], Any]) -> Any:
        """Stands for the loader's ``__iter__``."""

    def fetch(self, original: Callable[[], Any]) -> Any:
        """Stands for its ``__next__``."""

    def close(self) -> None:
        """Is called before its ``reset``."""


def watch_loaders(trainer: Any, train: Watch, validation: Watch) -> None:
    """Have the combined loaders of training, and of validation within training, tell of their passes from now on."""
    for loop, mode, watch in (
        (trainer.fit_loop, "max_size_cycle", train),
        (trainer.fit_loop.epoch_loop.val_loop, "sequential", validation),
    ):
        source = loop._data_source
        source.dataloader = functools.partial(_watched_loader, loop, mode, watch)


def unwatch_loaders(trainer: Any) -> None:
    """Undo ``watch_loaders``."""
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop):
        loop._data_source.__dict__.pop("dataloader", None)
        if loop._combined_loader is not None and vars(loop._combined_loader).pop("peft_watch", None) is not None:
            loop._combined_loader.__class__ = type(loop._combined_loader).__mro__[1]


def _watched_loader(loop: Any, mode: str, watch: Watch) -> Any:
    combined_loader = sys.modules[type(loop).__module__].CombinedLoader  # of the Trainer's name space
    loaders = type(loop._data_source).dataloader(loop._data_source)
    combined = loaders if isinstance(loaders, combined_loader) else combined_loader(loaders, mode)
    if "peft_watch" not in vars(combined):
        kind: Any = type(combined)
        combined.__class__ = _watched_class(kind)
    combined.peft_watch = watch
    return combined


@functools.cache
def _watched_class(combined_loader: Any) -> Any:
    """Return a subclass that tells its watch; it derives from nothing else, so that an object can change to it."""

    def iterate(self: Any) -> Any:
        return self.peft_watch.open(self, functools.partial(combined_loader.__iter__, self))

    def fetch(self: Any) -> Any:
        return self.peft_watch.fetch(functools.partial(combined_loader.__next__, self))

    def reset(self: Any) -> None:
        self.peft_watch.close()
        combined_loader.reset(self)

    return type(combined_loader.__name__, (combined_loader,), {"__iter__": iterate, "__next__": fetch, "reset": reset})


@contextmanager
def iterating_over(combined: Any, iterables: list[Any]) -> Iterator[None]:
    """Context in which a combined loader makes an iterator over others than its own loaders."""
    own, combined._flattened = combined._flattened, iterables
    try:
        yield
    finally:
        combined._flattened = own


def consumed(combined: Any) -> list[bool]:
    """Return which loaders of an epoch have come to an end and begun again."""
    return list(getattr(getattr(combined, "_iterator", None), "_consumed", ()))


def set_consumed(combined: Any, consumed: list[bool], batches: int) -> None:
    """Have a combined loader count on from a number of batches."""
    combined._iterator._idx = batches
    if consumed:
        combined._iterator._consumed = consumed


def reopen_loaders(trainer: Any) -> None:
    """Have the train loaders iterated anew."""
    trainer.fit_loop._combined_loader.reset()
    iter(trainer.fit_loop._data_fetcher)


def load_loader_states(trainer: Any, states: list[Any] | None) -> None:
    """Load states of loaders that resume by themselves: these, or those of the checkpoint, where Lightning did not."""
    loop = trainer.fit_loop
    own, loop._combined_loader_states_to_load = loop._combined_loader_states_to_load, []
    loop._combined_loader._load_state_dicts(states or own)


def has_length(combined: Any) -> bool:
    """Whether an epoch's number of batches is known."""
    try:
        return len(combined) != float("inf")
    except (TypeError, NotImplementedError, OverflowError):
        return False
