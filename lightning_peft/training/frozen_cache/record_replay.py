"""A step whose frozen trunk is cached: the trunk runs and is kept, or is replaced by what was kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...core.adapter import Call
from .frozen_parts import Trunk
from .row_index import ADVICE, PLAIN, CallRecord, Entry, KeptRows, form_of, signature
from .row_store import Form
from .use_tracing import Place, trace, untraced

Choose = Callable[["CachedStep", Any], "Recording | Replay"]


class CachedStep:
    """One training or validation step."""

    def __init__(self, batch: Any, trains: bool, choose: Choose) -> None:
        self.batch, self.trains, self.choose = batch, trains, choose
        self.past_trunk = self.checked = False
        self.mode: Recording | Replay | None = None
        self.first: str | None = None  # of what trains
        self.used = set[Place]()
        self.late: dict[str, None] = {}  # frozen parts that run after it

    def call(self, name: str, inner: Call, args: Any, kwargs: Any) -> Any:
        if self.mode is None:
            self.mode = self.choose(self, (args, kwargs))
        return self.mode.call(name, inner, args, kwargs)

    def end_trunk(self, name: str) -> None:
        self.past_trunk = True
        self.first = self.first or name

    def run_late(self, name: str) -> None:
        self.late[name] = None

    def use(self, places: Iterable[Place]) -> None:
        self.used |= set(places)
        if isinstance(self.mode, Replay):
            call, _ = min(self.used)
            raise RuntimeError(
                f"What {self.mode.calls[call].name} returns is used in this step and was not in the first, so it was "
                f"not cached. Let each training and validation step use the same outputs, {ADVICE}"
            )


class Recording:
    """Runs the trunk; keeps what is needed of it, or compares it with what was kept."""

    def __init__(
        self,
        step: CachedStep,
        rows: int,
        trunk: Trunk,
        kept: KeptRows,
        new: Mapping[int, bytes],
        expected: Replay | None = None,
    ) -> None:
        self.step, self.rows, self.trunk, self.kept, self.new, self.expected = step, rows, trunk, kept, new, expected
        self.is_first_step = not kept.calls  # as the first step does
        self.calls: list[CallRecord] = []
        self.values: dict[Place, Tensor] = {}
        self.starts: dict[Place, int] = {}
        self.random = _random_states()

    def call(self, name: str, inner: Call, args: Any, kwargs: Any) -> Any:
        args, kwargs = untraced((args, kwargs))
        given, position = tree_flatten((args, kwargs)), len(self.calls)
        trains = any(isinstance(x, Tensor) and x.requires_grad for x in given[0])
        other = not self.is_first_step and [call.name for call in self.kept.calls[position : position + 1]] != [name]
        if trains or other or self._changes_its_input(name, given[0]):
            self.step.end_trunk(f"what {name} is given")
            return inner(*args, **kwargs)
        with self.trunk.buffers_stay(name) if self.is_first_step else contextlib.nullcontext():
            output = inner(*args, **kwargs)
        leaves, spec = tree_flatten(output)
        if any(isinstance(x, Tensor) and x.requires_grad for x in leaves):
            self.step.end_trunk(name)
            return output
        self._check_not_random(name)
        forms = tuple(form_of(name, x, self.rows) for x in leaves)
        self.calls.append(CallRecord(name, signature(*given), spec, forms))
        if not self.is_first_step:
            self._write(position, leaves)
            return output
        places = {(position, i): x for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        self.values |= {place: x.clone() for place, x in places.items()}
        traced = [trace(x, [(position, i)], self.step) if isinstance(x, Tensor) else x for i, x in enumerate(leaves)]
        return tree_unflatten(traced, spec)

    def keep(self) -> None:
        """Make the rows known, if the step has called all of the trunk."""
        if self.is_first_step:
            if not self.calls or not self.step.used:
                return
            self.kept.calls, self.kept.needed = tuple(self.calls), frozenset(self.step.used)
            for place in self.kept.needed if self.new else ():
                self.starts[place] = self.kept.store.write(self.values[place])
        if self.new and len(self.calls) == len(self.kept.calls):
            self.kept.add(self.calls, self.rows, self.starts, self.new.values())

    def _write(self, position: int, leaves: Sequence[Any]) -> None:
        """Write what is needed at once: whoever gets it may change it in place."""
        for place in [place for place in self.kept.needed if place[0] == position]:
            value = leaves[place[1]]
            if self.expected is not None:
                self.expected.compare(place, value)
            elif self.new:
                by_row = self.calls[position].leaves[place[1]].by_row
                self.starts[place] = self.kept.store.write(value[list(self.new)] if by_row else value)

    def _changes_its_input(self, name: str, given: Sequence[Any]) -> bool:
        kinds = [type(x).__name__ for x in given if not isinstance(x, (Tensor, *PLAIN))]
        if kinds and self.is_first_step:
            raise ValueError(
                f"cache_frozen=True cannot skip {name}: it is given a {kinds[0]}, which it may change. Do without that "
                f"object (of a model of transformers: use_cache=False), {ADVICE}"
            )
        return bool(kinds)

    def _check_not_random(self, name: str) -> None:
        if any(not torch.equal(a, b) for a, b in zip(self.random, _random_states(), strict=False)):
            raise ValueError(
                f"cache_frozen=True needs a trunk that is not random, but random numbers were drawn before {name} "
                f"returned, as by active dropout. Set its dropout to 0, {ADVICE}"
            )


class Replay:
    """Returns what the trunk returned, without running it."""

    def __init__(self, step: CachedStep, kept: KeptRows, entries: Sequence[Entry]) -> None:
        self.step, self.kept, self.entries = step, kept, entries
        self.calls = entries[0][0].calls
        self.position = 0

    def call(self, name: str, inner: Call, args: Any, kwargs: Any) -> Any:
        if self.position == len(self.calls):
            self.step.end_trunk(f"what {name} is given")
            return inner(*args, **kwargs)
        call = self.calls[self.position]
        given = signature(*tree_flatten((args, kwargs)))
        if (call.name, call.given) != (name, given):
            raise RuntimeError(
                f"This step calls {name} where {call.name} was called when its rows were cached, or with other "
                f"arguments. Let each training and validation step call the trunk in the same way, {ADVICE}"
            )
        leaves = [self.leaf((self.position, i), form) for i, form in enumerate(call.leaves)]
        self.position += 1
        return tree_unflatten(leaves, call.spec)

    def leaf(self, place: Place, form: Any) -> Any:
        """Return one output; one that is not needed has no values, and tells of any use."""
        if not isinstance(form, Form):
            return form
        if place in self.kept.needed:
            return self.kept.read(place, form, self.entries)
        return trace(form.absent(len(self.entries)), [place], self.step)

    def compare(self, place: Place, value: Tensor) -> None:
        """Raise if the trunk has returned other bits than the cache holds."""
        call = self.calls[place[0]]
        kept = self.kept.read(place, call.leaves[place[1]], self.entries)
        if kept.dtype == value.dtype and torch.equal(_bits(kept), _bits(value)):
            return
        sizes = sorted({block.rows for block, _ in self.entries})
        raise RuntimeError(
            f"cache_frozen=True needs the same bits each time, but {call.name} returns others than those cached. It is "
            f"random, or its kernels depend on the batch: rows came in batches of {sizes} and are in one of "
            f"{len(self.entries)} now. Use batches of one size (drop_last=True), a trunk without randomness, {ADVICE}"
        )


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _random_states() -> list[Tensor]:
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else ())]
