"""``factor_type``: the type in which an input meets the factors of an update."""

from __future__ import annotations

import torch
from torch import Tensor


def factor_type(x: Tensor) -> torch.dtype:
    """Return the type for products of an input with factors: that of the input, but float32 for float16.

    What lies between two factors has no bound by the layer's output: A x may exceed the 65,504 of float16 where B A x
    does not. Under autocast, the products run in its type all the same, as those of all layers do.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype
