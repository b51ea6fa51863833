"""``is_true`` and ``reading_is_free``: looking at values without making a device wait."""

from __future__ import annotations

import torch
from torch import Tensor

_FREE = ("cpu",)  # kinds of devices whose values are there as soon as a function has returned
_ASSERTING = ("cuda", "meta")  # kinds of devices that can raise by themselves


def reading_is_free(x: Tensor) -> bool:
    """Return whether a value can be read: no device is waited for, and no graph is broken."""
    return x.device.type in _FREE and not torch.compiler.is_compiling()


def is_true(condition: Tensor, message: str) -> bool:
    """Return whether a condition, one boolean, holds.

    Where reading it is not free, the device checks it instead and raises this message, and True is returned.
    """
    if condition.device.type in _ASSERTING or torch.compiler.is_compiling():
        torch._assert_async(condition, message)
        return True
    return bool(condition)
