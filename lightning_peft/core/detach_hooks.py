"""``call_on_detach``: what else was put on a model while it has adapters goes with them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_HOOKS = "_peft_detach_hooks"


def call_on_detach(model: nn.Module, function: Callable[[nn.Module], None]) -> None:
    """Have ``detach`` call a function with this model or a copy of it, once however often it is named."""
    functions = model.__dict__.setdefault(_HOOKS, [])
    if function not in functions:
        functions.append(function)


def run_detach_hooks(model: nn.Module) -> None:
    """Call these functions, and forget them."""
    for function in model.__dict__.pop(_HOOKS, ()):
        function(model)
