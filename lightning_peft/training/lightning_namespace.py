"""Lightning's two name spaces, ``lightning.pytorch`` and ``pytorch_lightning``: which of their classes an object has.

Both are Lightning, copied; a class of one is none of the other. All that asks for a class of Lightning's asks here.
"""

from __future__ import annotations

import sys
from typing import Any, TypeGuard, TypeVar

import lightning.pytorch as pl
from lightning_utilities.core.overrides import is_overridden

_HERE, _OTHER = "lightning.pytorch", "pytorch_lightning"
_Class = TypeVar("_Class")


def is_instance(value: Any, *classes: type[_Class]) -> TypeGuard[_Class]:
    """Whether a value is an instance of one of these classes of ``lightning.pytorch``, or of their counterparts."""
    return isinstance(value, tuple(same for cls in classes for same in counterparts(cls)))


def counterparts(cls: type[_Class]) -> tuple[type[_Class], ...]:
    """Return a class of ``lightning.pytorch`` in each name space that the program has imported."""
    module = sys.modules.get(cls.__module__.replace(_HERE, _OTHER, 1))
    other = getattr(module, cls.__name__, None) if cls.__module__.startswith(_HERE) else None
    return (cls,) if other is None else (cls, other)


def overrides(module: pl.LightningModule, hook: str) -> bool:
    """Whether a LightningModule, of either name space, brings a hook of its own."""
    parents = (parent for parent in counterparts(pl.LightningModule) if isinstance(module, parent))
    return any(is_overridden(hook, module, parent) for parent in parents)


def make_callback_of_both(cls: type, base: type[pl.Callback] = pl.Callback) -> None:
    """Let a class of callbacks be a ``Callback``, or one derived from it, of each name space that is imported.

    A Trainer of ``pytorch_lightning`` takes a single callback by its class alone. Importing both name spaces takes
    twice the time, so that the other one is looked for when a callback is built.
    """
    missing = tuple(same for same in counterparts(base) if not issubclass(cls, same))
    if missing:
        cls.__bases__ += missing
