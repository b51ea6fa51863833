"""``apply_function``: an autograd function is recorded where gradients are, and is plain operators elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_traced() -> bool:
    """Return whether ``torch.jit.trace`` runs."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def records_gradients() -> bool:
    """Return whether autograd functions are recorded: gradients are, and nothing is traced.

    A trace holds operators alone. It is checked by a second one without gradients, which must be the same.
    """
    return torch.is_grad_enabled() and not is_traced()


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """Return what an autograd function, with ``setup_context``, returns for these arguments.

    Where it is not recorded, its ``forward`` is called as it is: without gradients, ``torch.compile`` fails to trace
    the function.
    """
    apply: Any = function.apply if records_gradients() else function.forward
    result: Tensor = apply(*args)
    return result
