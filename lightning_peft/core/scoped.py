"""``Scoped``: a value for one thread and asyncio task, and for checkpointed parts that backward calls again."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

from ..ops.torch_api import wrap_checkpointed

T = TypeVar("T")
_Stack = tuple[tuple[object, Any], ...]  # (the context that set it, value); the last one holds
_STACKS: ContextVar[Mapping[Any, _Stack] | None] = ContextVar("lightning_peft", default=None)


class Scoped(Generic[T]):
    """A value that other threads and asyncio tasks do not see, as in a ``ContextVar``, but in one object.

    What runs under ``torch.compile`` reads it from a ``threading.local``, which can be guarded and a ``ContextVar``
    cannot: there it belongs to the thread alone. Copies and files start without a value.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def get(self) -> T | None:
        """Return the value in this thread and task; None where there is none."""
        if torch.compiler.is_dynamo_compiling():
            value: T | None = getattr(self._of_thread, "value", None)
            return value
        stacks = _STACKS.get()
        if stacks is None or (stack := stacks.get(self)) is None:
            return None
        return stack[-1][1]  # type: ignore[no-any-return]

    def outermost(self) -> T | None:
        """Return the value around all contexts that are open in this thread and task."""
        context, value = self._stack()[0] if self._stack() else (None, None)
        return value if context is None else None

    def set(self, value: T | None) -> None:
        """Set the value in this thread and task until it is set again; None removes it."""
        if value is not None:
            wrap_checkpointed(_with_stacks_of_now)
        self._replace(() if value is None else ((None, value),))

    @contextmanager
    def during(self, value: T) -> Iterator[None]:
        """Context in which the value is another one.

        Raises:
            RuntimeError: It was left in another thread or task than it was entered in, as some generators are.
        """
        if torch.compiler.is_dynamo_compiling():
            before = self.get()
            self._of_thread.value = value
            try:
                yield
            finally:
                self._of_thread.value = before
            return
        wrap_checkpointed(_with_stacks_of_now)
        context = object()
        self._replace((*self._stack(), (context, value)))
        try:
            yield
        finally:
            stack = self._stack()
            others = tuple(entry for entry in stack if entry[0] is not context)  # generators may leave in any order
            if len(others) == len(stack):
                raise RuntimeError(
                    "A context of lightning_peft was left in another thread or asyncio task than it was entered in, "
                    "where it goes on. Enter and leave it in one function, and not around the yield of a generator "
                    "that another thread or task finishes."
                )
            self._replace(others)

    def _stack(self) -> _Stack:
        return (_STACKS.get() or {}).get(self, ())

    def _replace(self, stack: _Stack) -> None:
        others = {scoped: each for scoped, each in (_STACKS.get() or {}).items() if scoped is not self}
        _assign({**others, self: stack} if stack else others)


def _assign(stacks: Mapping[Any, _Stack] | None) -> None:
    changed = {**(_STACKS.get() or {}), **(stacks or {})}
    _STACKS.set(stacks or None)
    for scoped in changed:
        if stack := (stacks or {}).get(scoped):
            scoped._of_thread.value = stack[-1][1]
        else:  # as if it had never been set, so that compiled code need not be compiled again
            vars(scoped._of_thread).pop("value", None)


def _with_stacks_of_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs with the values of now, whenever and in whichever thread backward calls it."""
    stacks = _STACKS.get()

    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        before = _STACKS.get()
        if before is stacks:
            return function(*args, **kwargs)
        _assign(stacks)
        try:
            return function(*args, **kwargs)
        finally:
            _assign(before)

    return run
