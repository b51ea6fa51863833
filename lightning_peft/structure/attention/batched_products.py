"""``is_product_of_batches``: products of two tensors with a matrix for each row or head, as attention has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

PRODUCTS = frozenset(("matmul", "bmm", "__matmul__", "baddbmm"))


def is_product_of_batches(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a function multiplies matrices of batches, as queries with keys, and none with a weight."""
    name = getattr(func, "__name__", "")
    return name in PRODUCTS and are_batches(*factors(name, args, kwargs))


def are_batches(a: Any, b: Any) -> bool:
    """Return whether both factors have a matrix for each row or head."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim() and a.dim() in (3, 4)


def factors(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the factors among the arguments of a product; None for both if they are not given by position."""
    if name == "baddbmm":
        args = [*args[1:], *(kwargs[key] for key in ("batch1", "batch2") if key in kwargs)]
    return (args[0], args[1]) if len(args) > 1 else (None, None)
