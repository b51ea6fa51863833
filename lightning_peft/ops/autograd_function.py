"""``apply_function``: an autograd function is recorded where gradients are, and is plain operators elsewhere."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from .torch_api import in_function_transform


def is_traced() -> bool:
    """Return whether ``torch.jit.trace`` runs."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def records_gradients() -> bool:
    """Return whether autograd functions are recorded: gradients are, and nothing is traced.

    A trace holds operators alone. It is checked by a second one without gradients, which must be the same.
    """
    return torch.is_grad_enabled() and not is_traced()


def apply_function(function: type[Function], *args: Any) -> Tensor:
    """Return what an autograd function, with ``setup_context``, returns for these arguments.

    Where it is not recorded, its ``forward`` is called as it is: without gradients, ``torch.compile`` fails to trace
    the function.
    """
    apply: Any = function.forward
    if records_gradients():
        keeps_apply = torch.compiler.is_compiling() or in_function_transform()
        apply = function.apply if keeps_apply else _apply_without_binding(function)
    result: Tensor = apply(*args)
    return result


@functools.cache
def _apply_without_binding(function: type[Function]) -> Any:
    """Return the ``apply`` of the same function with the context in its ``forward``.

    ``apply`` of a function that has ``setup_context`` binds the signature of ``forward`` in each call, which takes as
    long as several products of small matrices. Transforms of ``torch.func`` need ``setup_context``.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    namespace = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    combined = type(function.__name__, (Function,), namespace | {"__module__": function.__module__})
    return cast(Any, combined).apply
