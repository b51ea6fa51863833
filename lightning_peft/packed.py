"""Rows of different lengths, which torch's encoder packs into one nested tensor in eval mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_rows(change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``change(x)``, computed row by row where rows are packed."""
    return torch.nested.as_nested_tensor([change(row) for row in x.unbind()]) if x.is_nested else change(x)
