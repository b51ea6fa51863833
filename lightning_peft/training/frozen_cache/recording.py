"""``Recording``: a step that runs the frozen trunk, and keeps its outputs or compares them with those kept before."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...core.adapter import Call
from .cached_step import CachedStep, Replay
from .frozen_parts import Trunk
from .row_index import ADVICE, PLAIN, CallRecord, RowIndex, input_signature, layout_of
from .use_tracing import OutputKey, trace, untraced


class Recording:
    """Runs the trunk, and writes the rows of its outputs or compares them with those that are in the file.

    The first step of a training finds out which outputs are used outside of the trunk; only these are written.

    Args:
        step: The step.
        rows: Rows of its batch.
        trunk: The trunk.
        index: Where rows are kept.
        new: Keys of the rows to write, by their position in the batch.
        expected: What the outputs must be equal to, if all rows are known.
    """

    def __init__(
        self,
        step: CachedStep,
        rows: int,
        trunk: Trunk,
        index: RowIndex,
        new: Mapping[int, bytes],
        expected: Replay | None = None,
    ) -> None:
        self.step, self.rows, self.trunk, self.index, self.new, self.expected = step, rows, trunk, index, new, expected
        self.is_first_step = not index.calls
        self.calls: list[CallRecord] = []
        self.values: dict[OutputKey, Tensor] = {}  # of the first step, until it is known which of them are used
        self.starts: dict[OutputKey, int] = {}
        self.random_states = _random_states()

    def call(self, name: str, inner: Call, args: Any, kwargs: Any) -> Any:
        args, kwargs = untraced((args, kwargs))
        inputs, spec = tree_flatten((args, kwargs))
        if _needs_gradient(inputs) or not self._is_next(name) or self._may_change(name, inputs):
            self.step.end_trunk(f"what {name} is given")
            return inner(*args, **kwargs)
        with self.trunk.buffers_stay(name) if self.is_first_step else contextlib.nullcontext():
            output = inner(*args, **kwargs)
        leaves, output_spec = tree_flatten(output)
        if _needs_gradient(leaves):
            self.step.end_trunk(name)
            return output
        self._check_not_random(name)
        layouts = tuple(layout_of(name, x, self.rows) for x in leaves)
        self.calls.append(CallRecord(name, input_signature(inputs, spec), output_spec, layouts))
        if self.is_first_step:
            return tree_unflatten(self._trace(leaves), output_spec)
        self._write(leaves)
        return output

    def keep(self) -> None:
        """Add the rows to the index, if the step has called all of the trunk."""
        if self.is_first_step:
            if not self.calls or not self.step.used:
                return
            self.index.calls, self.index.needed = tuple(self.calls), frozenset(self.step.used)
            for output in self.index.needed if self.new else ():
                self.starts[output] = self.index.store.write(self.values[output])
        if self.new and len(self.calls) == len(self.index.calls):
            self.index.add(self.calls, self.rows, self.starts, self.new.values())

    def _is_next(self, name: str) -> bool:
        """Whether the first step called this part after as many others, too; in the first step, any part is next."""
        position = len(self.calls)
        return self.is_first_step or [call.name for call in self.index.calls[position : position + 1]] == [name]

    def _trace(self, leaves: Sequence[Any]) -> list[Any]:
        """Copy the tensors among the outputs of the last call, and return them tracked."""
        result, position = list(leaves), len(self.calls) - 1
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self.values[position, i] = leaf.clone()
                result[i] = trace(leaf, [(position, i)], self.step)
        return result

    def _write(self, leaves: Sequence[Any]) -> None:
        """Write what is needed of the last call at once: whoever gets it may change it in place."""
        position = len(self.calls) - 1
        for output in [output for output in self.index.needed if output[0] == position]:
            value = leaves[output[1]]
            if self.expected is not None:
                self.expected.compare(output, value)
            elif self.new:
                by_row = self.calls[position].leaves[output[1]].by_row
                self.starts[output] = self.index.store.write(value[list(self.new)] if by_row else value)

    def _may_change(self, name: str, inputs: Sequence[Any]) -> bool:
        """Whether a part is given an object, such as a key-value cache, that it may change; the first step raises."""
        kinds = [type(x).__name__ for x in inputs if not isinstance(x, (Tensor, *PLAIN))]
        if kinds and self.is_first_step:
            raise ValueError(
                f"cache_frozen=True cannot skip {name}: it is given a {kinds[0]}, which it may change. Do without that "
                f"object (of a model of transformers: use_cache=False), {ADVICE}"
            )
        return bool(kinds)

    def _check_not_random(self, name: str) -> None:
        if any(not torch.equal(a, b) for a, b in zip(self.random_states, _random_states(), strict=False)):
            raise ValueError(
                f"cache_frozen=True needs a trunk that is not random, but random numbers were drawn before {name} "
                f"returned, as by active dropout. Set its dropout to 0, {ADVICE}"
            )


def _needs_gradient(values: Sequence[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in values)


def _random_states() -> list[Tensor]:
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else ())]
