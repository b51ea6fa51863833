"""``factor_type``: the type in which an input meets factors; ``in_type``, ``one_type`` and ``under_autocast``."""

from __future__ import annotations

import torch
from torch import Tensor


def factor_type(x: Tensor) -> torch.dtype:
    """Return the type for products of an input with factors: that of the input, but float32 for float16.

    What lies between two factors has no bound by the layer's output: A x may exceed the 65,504 of float16 where B A x
    does not. Under autocast, the products run in its type all the same, as those of all layers do.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def in_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``, which takes as long as a small sum even where it changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def under_autocast(x: Tensor) -> bool:
    """Return whether autocast changes the types of operations on a tensor; to ask raises for the meta device."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def one_type(x: Tensor, *others: Tensor) -> bool:
    """Return whether an input and what it meets have one type, float32 or float64, and autocast changes none."""
    if x.dtype not in (torch.float32, torch.float64) or under_autocast(x):
        return False
    return all(other.dtype == x.dtype for other in others)
