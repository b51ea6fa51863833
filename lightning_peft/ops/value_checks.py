"""``is_true``: a check of values that makes no device wait."""

from __future__ import annotations

import torch
from torch import Tensor

_ASSERTING = ("cuda", "meta")  # kinds of devices that can raise by themselves


def is_true(condition: Tensor, message: str) -> bool:
    """Return whether a condition, one boolean, holds.

    Where reading it would make a device wait or break a graph, the device checks it instead and raises this message,
    and True is returned.
    """
    if condition.device.type in _ASSERTING or torch.compiler.is_compiling():
        torch._assert_async(condition, message)
        return True
    return bool(condition)
