"""Exact costs of a call: dispatched operators, those of them that start a kernel, and Python frames."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")


class OperatorCount(TorchDispatchMode):
    """Counts what reaches the dispatcher, by name: ``with OperatorCount() as count: ...; count.total()``."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()  # without views and allocations, which start nothing on a GPU

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        self.operators[name] += 1
        returns = [returned.alias_info for returned in function._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in returns)
        self.kernels[name] += not views and name not in ALLOCATIONS
        return function(*args, **(kwargs or {}))


def operators(call: Callable[[], object]) -> tuple[int, int]:
    """Return how many operators a call dispatches, backward included, and how many of them are kernels.

    The first call, which may build what later calls reuse, is not counted.
    """
    call()
    with OperatorCount() as count:
        call()
    return count.operators.total(), count.kernels.total()


def frames(call: Callable[[], object]) -> int:
    """Return how many Python functions run in a call."""
    entered = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    call()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered - 1  # ``call`` itself
