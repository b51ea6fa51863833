"""``LazyWeight``: a stand-in for a weight that is never built, known by what products with it are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

_MATMUL = {"matmul", "bmm", "mm", "__matmul__", "__rmatmul__"}
# Of torch, and of transformers where torch has none.
_GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback", "grouped_mm_fallback.default"}
_ALIGNMENT = 16  # bytes, of which the strides of grouped products are multiples


@dataclass(frozen=True)
class Product:
    """A product that code asked for: of ``x`` with a weight, from the right, from the left, or transposed.

    Args:
        x: The other factor.
        times: Computes x W, W x or x W^T from x and W. The gradient of x is ``times(gradient, W.mT)``.
        from_right: Whether it is x W.
        grouped: Whether consecutive rows of x have a matrix each.
        bias: Bias that is added to x W^T.
    """

    x: Tensor
    times: Callable[[Tensor, Tensor], Tensor]
    from_right: bool
    grouped: bool = False
    bias: Tensor | None = None

    def with_weight(self, weight: Tensor) -> Tensor:
        """Return the result for a weight, by the function that was called."""
        return self.times(self.x, weight) if self.bias is None else F.linear(self.x, weight, self.bias)

    def rank_multiple(self) -> int:
        """Return the number of which a matrix between two products has a multiple of columns."""
        return _ALIGNMENT // self.x.element_size() if self.grouped else 1


class LazyWeight(ABC):
    """Weight (..., a, b) for which products, indexing and transposing are defined; all else builds it by ``full``.

    It is put in the place of a parameter of a module, and no tensor, so that no kernel can read it by its address:
    what asks for an attribute that is not here is refused.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def product(self, product: Product) -> Tensor:
        """Return the result of a product with this weight."""

    @abstractmethod
    def full(self) -> Tensor:
        """Return the weight as a tensor."""

    @abstractmethod
    def __getitem__(self, index: Any) -> Self:
        """Return the weights at an index of the first dimension."""

    @property
    @abstractmethod
    def mT(self) -> Self:  # noqa: N802  # as of a tensor
        """The weight with its last two dimensions exchanged."""

    def transpose(self, dim0: int, dim1: int) -> Self | Tensor:
        """Return the weight with two dimensions exchanged."""
        last = {len(self.shape) - 2, len(self.shape) - 1}
        if {dim % len(self.shape) for dim in (dim0, dim1)} == last:
            return self.mT
        return self.full().transpose(dim0, dim1)

    @property
    def T(self) -> Self | Tensor:  # noqa: N802
        """The transposed matrix."""
        return self.transpose(0, 1)

    def t(self) -> Self | Tensor:
        """Return the transposed matrix."""
        return self.transpose(0, 1)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or the size of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"Code of this module asks for {name!r} of an adapted or quantized weight of experts, which is not built. "
            f"Choose another implementation, such as model.set_experts_implementation('grouped_mm') or 'eager'."
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (found := _product_of(func, args, kwargs)) is not None:
            weight, product = found
            return weight.product(product)
        return func(*map(_built, args), **{name: _built(value) for name, value in kwargs.items()})


def _built(value: Any) -> Any:
    return value.full() if isinstance(value, LazyWeight) else value


def _product_of(func: Any, args: Any, kwargs: Any) -> tuple[LazyWeight, Product] | None:
    """Return the weight and the product that a call of a function asks for; None for all other functions."""
    name = getattr(func, "__name__", "")
    first, second, *rest = (*args, None, None)[: max(2, len(args))]
    if isinstance(first, LazyWeight) and isinstance(second, Tensor) and name in _MATMUL and not rest:
        return first, Product(second, lambda x, w: torch.matmul(w, x), from_right=False)
    if not (isinstance(first, Tensor) and isinstance(second, LazyWeight)):
        return None
    if name == "linear":
        bias = rest[0] if rest else kwargs.get("bias")
        return second, Product(first, F.linear, from_right=False, bias=bias)
    if name in _MATMUL and not (rest or kwargs):
        return second, Product(first, torch.matmul, from_right=True)
    if name in _GROUPED:
        return second, Product(first, partial(_with_rest, func, tuple(rest), kwargs), from_right=True, grouped=True)
    return None


def _with_rest(func: Any, rest: Any, kwargs: Any, x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = func(x, weight, *rest, **kwargs)
    return result
