"""``CachedStep``: one step of the cache; ``Replay`` returns in it what the trunk returned, without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...core.adapter import Call
from .row_index import ADVICE, RowEntry, RowIndex, input_signature
from .row_store import RowLayout
from .use_tracing import OutputKey, trace

if TYPE_CHECKING:
    from .recording import Recording

ChooseMode = Callable[["CachedStep", Any], "Recording | Replay"]


class CachedStep:
    """One training or validation step.

    Args:
        batch: Its batch.
        trains: Whether it is a training step.
        choose_mode: Returns the mode of the step at its first call of the trunk.
    """

    def __init__(self, batch: Any, trains: bool, choose_mode: ChooseMode) -> None:
        self.batch, self.trains, self.choose_mode = batch, trains, choose_mode
        self.past_trunk = self.checked = False
        self.mode: Recording | Replay | None = None
        self.first_trained: str | None = None  # name of the first module that trains
        self.used = set[OutputKey]()
        self.late: dict[str, None] = {}  # frozen parts that run after it

    def call(self, name: str, inner: Call, args: Any, kwargs: Any) -> Any:
        if self.mode is None:
            self.mode = self.choose_mode(self, (args, kwargs))
        return self.mode.call(name, inner, args, kwargs)

    def end_trunk(self, name: str) -> None:
        self.past_trunk = True
        self.first_trained = self.first_trained or name

    def run_late(self, name: str) -> None:
        self.late[name] = None

    def note_use(self, outputs: Iterable[OutputKey]) -> None:
        self.used |= set(outputs)
        if isinstance(self.mode, Replay):
            call, _ = min(self.used)
            raise RuntimeError(
                f"What {self.mode.calls[call].name} returns is used in this step and was not in the first, so it was "
                f"not cached. Let each training and validation step use the same outputs, {ADVICE}"
            )


class Replay:
    """Returns what the trunk returned, without running it.

    Args:
        step: The step.
        index: Where rows are kept.
        entries: The rows of the step's batch.
    """

    def __init__(self, step: CachedStep, index: RowIndex, entries: Sequence[RowEntry]) -> None:
        self.step, self.index, self.entries = step, index, entries
        self.calls = entries[0][0].calls
        self.position = 0

    def call(self, name: str, inner: Call, args: Any, kwargs: Any) -> Any:
        if self.position == len(self.calls):
            self.step.end_trunk(f"what {name} is given")
            return inner(*args, **kwargs)
        call = self.calls[self.position]
        if (call.name, call.inputs) != (name, input_signature(*tree_flatten((args, kwargs)))):
            raise RuntimeError(
                f"This step calls {name} where {call.name} was called when its rows were cached, or with other "
                f"arguments. Let each training and validation step call the trunk in the same way, {ADVICE}"
            )
        leaves = [self._read((self.position, i), layout) for i, layout in enumerate(call.leaves)]
        self.position += 1
        return tree_unflatten(leaves, call.spec)

    def compare(self, output: OutputKey, value: Tensor) -> None:
        """Raise if the trunk has returned other bits than the file holds."""
        call = self.calls[output[0]]
        cached = self.index.read(output, call.leaves[output[1]], self.entries)
        if cached.dtype == value.dtype and torch.equal(_bits(cached), _bits(value)):
            return
        sizes = sorted({block.rows for block, _ in self.entries})
        raise RuntimeError(
            f"cache_frozen=True needs the same bits each time, but {call.name} returns others than those cached. It is "
            f"random, or its kernels depend on the batch: rows came in batches of {sizes} and are in one of "
            f"{len(self.entries)} now. Use batches of one size (drop_last=True), a trunk without randomness, {ADVICE}"
        )

    def _read(self, output: OutputKey, layout: Any) -> Any:
        """Return one output; one that is not needed has no values, and reports any use."""
        if not isinstance(layout, RowLayout):
            return layout
        if output in self.index.needed:
            return self.index.read(output, layout, self.entries)
        return trace(layout.blank(len(self.entries)), [output], self.step)


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)
