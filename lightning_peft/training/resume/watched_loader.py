"""``TrainWatch`` and ``ValidationWatch``: combined loaders tell where their passes are, and begin elsewhere."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable
from typing import Any

from .. import lightning_loaders as combined_loaders
from .index_gate import has_running_workers, is_stateful, start_workers
from .loader_pass import LoaderPass, Place
from .loader_state import (
    changed_counters,
    counters,
    generator_states,
    generators_of,
    set_counters,
    set_generator_states,
)
from .random_state import generator_state, global_state, kept_global_state, raw_state


class TrainWatch:
    """Follows the passes over the loaders of training.

    Args:
        is_awaited: Whether a checkpoint was loaded and training has not resumed: what is opened then is empty.
        before_fetch: Called before each batch is fetched.
    """

    def __init__(self, is_awaited: Callable[[], bool], before_fetch: Callable[[], None]) -> None:
        self.is_awaited, self.before_fetch = is_awaited, before_fetch
        self.loaders: list[Any] = []
        self.passes: list[LoaderPass] = []
        self._combined: Any = None
        self._first: list[dict[str, Any]] = []  # counters before the first pass
        self._next: dict[str, Any] | None = None  # where the next passes begin
        self._is_over = False  # whether they are over
        self._fetched = 0  # batches of this epoch
        self._fetches_ahead = False  # whether Lightning fetches a batch before it needs it, to know the last
        self._generators: list[list[tuple[str, Any]]] = []
        self._history: deque[dict[str, Any]] = deque(maxlen=3)  # a batch may be fetched ahead, and one be in work

    def open(self, combined: Any, original: Callable[[], Any]) -> Any:
        """Have a combined loader iterate over passes, and return it."""
        if not (self.is_awaited() or self._next or self._is_over):
            self.before_fetch()
        if [id(loader) for loader in combined.flattened] != [id(loader) for loader in self.loaders]:
            self.loaders, self._combined = list(combined.flattened), combined
            self._first = [counters(loader) for loader in self.loaders]
        self._generators = [list(generators_of(loader)) for loader in self.loaders]  # looked for once a pass
        begin, self._next = self._next, None
        places = begin["places"] if begin else [None] * len(self.loaders)
        for loader, first in zip(self.loaders, self._first, strict=True) if begin else ():
            set_counters(loader, first)  # the loader may have been iterated before the checkpoint was loaded
        is_over, self._is_over = self._is_over or self.is_awaited(), False
        self.passes = [LoaderPass(*each, is_over) for each in zip(self.loaders, self._first, places, strict=True)]
        with combined_loaders.iterating_over(combined, self.passes):
            original()
        self._fetched, self._fetches_ahead = begin["fetched"] if begin else 0, not combined_loaders.has_length(combined)
        if begin:
            combined_loaders.set_consumed(combined, begin["consumed"], self._fetched)
        self._history.clear()
        return combined

    def fetch(self, original: Callable[[], Any]) -> Any:
        """Return the next batch, and remember where it came from."""
        self.before_fetch()
        if self.passes[0].is_over:
            return original()
        generators = [{path: generator_state(each) for path, each in found} for found in self._generators]
        self._history.append({**self._now(), "random": raw_state(), "generators": generators})
        batch = original()
        self._fetched += 1
        return batch

    def place(self, batches: int) -> dict[str, Any] | None:
        """Return as plain data where a number of batches of this epoch had been fetched; None if it did not begin."""
        known = self._known(batches)
        if known is None or self.passes[0].is_over:
            return None
        places = [place.saved() for place in known["places"]]
        return {"places": places, "fetched": batches, "consumed": known["consumed"]}

    def loader_states(self, batches: int) -> list[Any] | None:
        """Return what loaders that resume by themselves said then; None if they say so still."""
        known = self._known(batches)
        return known["states"] if known and batches < self._fetched else None  # else Lightning saves them

    def begin_at(self, place: dict[str, Any] | None, batches: int) -> None:
        """Have the next passes begin at a place, or after a number of batches."""
        places = (
            [Place(**each) for each in place["places"]]
            if place
            else [Place(None, None, batches, False)] * len(self.loaders)
        )
        consumed = place["consumed"] if place else [False] * len(self.loaders)
        self._next = {"places": places, "fetched": batches, "consumed": consumed}

    def finish(self) -> None:
        """Have the next passes be over."""
        self._is_over = True

    def close(self) -> None:
        """Let go of the iterators."""
        for each in self.passes:
            each.close()

    def states(self) -> list[dict[str, Any]]:
        """Return the states of the loaders' own generators, their counters, and whether persistent workers run."""
        return [
            {
                "generators": generator_states(loader),
                "counters": changed_counters(loader, first),
                "running": has_running_workers(loader),
            }
            for loader, first in zip(self.loaders, self._first, strict=True)
        ]

    def set_generators(self, states: list[dict[str, Any]]) -> None:
        """Set the generators of each loader."""
        for loader, state in zip(self.loaders, states, strict=False):
            set_generator_states(loader, state)

    def end_passes(self, states: list[dict[str, Any]]) -> None:
        """Bring loaders to where ``states`` found them between two passes."""
        for loader, first, state in zip(self.loaders, self._first, states, strict=False):
            if is_stateful(loader):  # it begins the pass that has ended, so that the next one follows
                ended = iter(loader)
                next(ended, None) if inspect.isgenerator(ended) else None  # begins when it is asked for a batch
            elif state["running"] and not has_running_workers(loader):
                start_workers(loader)
            set_counters(loader, {**first, **state["counters"]})

    def _known(self, batches: int) -> dict[str, Any] | None:
        states = [*self._history, *([self._now()] if self.passes and self._fetched == batches else [])]
        return next((state for state in reversed(states) if state["fetched"] == batches), None)

    def _now(self) -> dict[str, Any]:
        places, stateful = [each.place for each in self.passes], [each for each in self.loaders if is_stateful(each)]
        states = [copy.copy(each.state_dict()) for each in stateful] if self._fetches_ahead and stateful else None
        consumed = combined_loaders.consumed(self._combined)
        return {"places": places, "fetched": self._fetched, "consumed": consumed, "states": states}

    def before_step(self) -> dict[str, Any] | None:
        """Return the generators' states from before the last batch was fetched, for a step that is done again."""
        if not self._history or "random" not in self._history[-1]:
            return None
        return {"random": global_state(self._history[-1]["random"]), "generators": self._history[-1]["generators"]}


class ValidationWatch:
    """Follows the passes over the loaders of validation within training.

    Args:
        before_open: Called before the loaders are asked for a pass.
    """

    def __init__(self, before_open: Callable[[], None]) -> None:
        self.before_open = before_open
        self.start: dict[str, Any] | None = None  # the global generators' states before the pass
        self.loaders: list[Any] = []
        self._ran: list[bool] = []

    def open(self, combined: Any, original: Callable[[], Any]) -> Any:
        """Have a combined loader begin a pass, and return it."""
        self.loaders = list(combined.flattened)
        with kept_global_state():
            for loader, ran in zip(self.loaders, self._ran, strict=False):
                if ran and not has_running_workers(loader):
                    start_workers(loader)
        self._ran = []
        self.before_open()
        self.start = global_state()
        return original()

    def fetch(self, original: Callable[[], Any]) -> Any:
        """Return the next batch."""
        return original()

    def close(self) -> None:
        """There is nothing to let go of."""

    def running(self) -> list[bool]:
        """Return which loaders' persistent workers run: their next pass draws no seed for them."""
        return [has_running_workers(loader) for loader in self.loaders]

    def set_running(self, running: list[bool]) -> None:
        """Have workers started before the next pass, without a trace in the generators."""
        self._ran = running
