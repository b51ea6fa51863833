"""``HeadSelection``: lets the output layer of a model see labelled places alone, while the model is called once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .places import Places
from .recorded_logits import RecordedLogits, Tape


class HeadSelection:
    """Hooks on a head for one call, in the thread that makes it: labelled rows go in, what comes out is recorded.

    Args:
        places: The labelled ones.
        whole: Whether all of them go in, with their gradients; else the first alone, which tells how logits are made.
    """

    def __init__(self, places: Places, whole: bool) -> None:
        self.places, self.whole, self.thread = places, whole, threading.get_ident()
        self.calls, self.tape = 0, Tape()
        self.rows = self.output = places.numbers  # until the head is called

    @contextmanager
    def during(self, head: nn.Module) -> Iterator[None]:
        """Context of the call."""
        handles = [head.register_forward_pre_hook(self._select)]
        if not self.whole:
            handles.append(head.register_forward_hook(self._record))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def explains(self, logits: Any) -> bool:
        """Return whether these are the logits of the rows that went in, by one call of the head."""
        rows = len(self.rows) if self.whole else 1
        if self.calls != 1 or not isinstance(logits, Tensor) or logits.shape[:-1] != (1, rows):
            return False
        if self.whole or isinstance(logits, RecordedLogits) or logits is self.output:
            return True
        return isinstance(logits, FakeTensor)  # which has no values, so nothing that was done to them is missed

    def _select(self, head: nn.Module, args: Any) -> Any:
        batch, tokens = self.places.shape
        if threading.get_ident() != self.thread or not args or args[0].dim() != 3:
            return None
        if len(args[0]) != batch or args[0].shape[1] < tokens:
            return None
        self.calls += 1
        self.rows = self.places.take(args[0])
        return (self.rows[None] if self.whole else self.rows[None, :1].detach(), *args[1:])

    def _record(self, head: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != self.thread or self.calls == 0:
            return output
        self.output = self.tape.record(output) if type(output) is Tensor else output
        return self.output
