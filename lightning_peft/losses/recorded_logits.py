"""``RecordedLogits`` notes what a model does to the output of its head, so that the same can be done to other rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class _Result:
    """The tensor of this number among the results of a step; step 0 is the output of the head."""

    step: int
    number: int


class Tape:
    """Functions that were applied to the output of a head, in their order; it holds no tensor computed from it."""

    def __init__(self) -> None:
        self.steps: list[tuple[Callable[..., Any], Any, Any]] = []

    def record(self, logits: Tensor) -> RecordedLogits:
        """Return the output of a head as a tensor that notes on this tape what is done to it."""
        recorded = logits.as_subclass(RecordedLogits)
        recorded.tape, recorded.result = self, _Result(0, 0)
        return recorded

    def note(self, function: Callable[..., Any], args: Any, kwargs: Any, results: Any) -> None:
        """Add a step."""
        self.steps.append((function, *tree_map(_reference, (args, kwargs))))
        for number, tensor in enumerate(tree_leaves(results)):
            if isinstance(tensor, RecordedLogits):
                tensor.tape, tensor.result = self, _Result(len(self.steps), number)

    def replayed(self, logits: RecordedLogits) -> Callable[[Tensor], Tensor] | None:
        """Return the function of the head's output whose result ``logits`` is; None if it is that output itself."""
        return partial(self._replay, logits.result) if self.steps else None

    def _replay(self, wanted: _Result, output: Tensor) -> Tensor:
        results: list[list[Any]] = [[output]]
        for function, args, kwargs in self.steps:
            args, kwargs = tree_map(lambda x: _resolve(x, results), (args, kwargs))
            results.append(tree_leaves(function(*args, **kwargs)))
        found: Tensor = results[wanted.step][wanted.number]
        return found


class RecordedLogits(Tensor):
    """Output of a head, and what is computed from it."""

    tape: Tape
    result: _Result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if any(isinstance(x, Tensor) for x in tree_leaves(results)) or results is None:  # else a shape or the like
            tape = next(x.tape for x in tree_leaves((args, kwargs)) if isinstance(x, cls))
            tape.note(func, args, kwargs or {}, results)
        return results


def _reference(x: Any) -> Any:
    return x.result if isinstance(x, RecordedLogits) else x


def _resolve(x: Any, results: list[list[Any]]) -> Any:
    return results[x.step][x.number] if isinstance(x, _Result) else x
