"""``wrap_hook``: puts a function around a hook of a LightningModule instance, such as configure_optimizers or setup."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl


def wrap_hook(module: pl.LightningModule, hook: str, around: Callable[..., Any]) -> None:
    """Replace ``module.hook`` by ``around(module, original, *args)``, where ``original`` is the module's own hook.

    Copies of the module keep the wrapped hook, bound to themselves. A second call replaces the first.
    """
    previous: Any = module.__dict__.get(hook)
    if isinstance(previous, types.MethodType) and previous.__self__ is module:
        previous = getattr(previous.__func__, "_peft_original", previous.__func__)
    elif previous is not None:  # put on the instance: a function, or the method of another object
        previous = functools.partial(_without_self, previous)

    def wrapped(self: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:
        original = getattr(type(self), hook) if previous is None else previous
        return around(self, functools.partial(original, self), *args, **kwargs)

    functools.update_wrapper(wrapped, previous or getattr(type(module), hook))  # so that Lightning sees an override
    wrapped.__name__ = hook  # pickling a bound method looks its function up by name
    wrapped._peft_original = previous  # type: ignore[attr-defined]
    module.__dict__[hook] = types.MethodType(wrapped, module)


def unwrap_hook(module: pl.LightningModule, hook: str) -> None:
    """Undo ``wrap_hook`` where it was called."""
    function: Any = getattr(module.__dict__.get(hook), "__func__", None)
    if not hasattr(function, "_peft_original"):
        return
    original = function._peft_original
    if original is None:
        del module.__dict__[hook]
    elif isinstance(original, functools.partial):
        module.__dict__[hook] = original.args[0]
    else:
        module.__dict__[hook] = types.MethodType(original, module)


def call_after(module: pl.LightningModule, hook: str, function: Callable[[pl.LightningModule], None]) -> None:
    """Call ``function(module)`` once, after the next call of a hook."""

    def around(module: pl.LightningModule, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        unwrap_hook(module, hook)
        original(*args, **kwargs)
        function(module)

    wrap_hook(module, hook, around)


def _without_self(function: Callable[..., Any], module: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
