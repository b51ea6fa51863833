"""``LazySum``: W + s B A as a ``LazyWeight``: a product with it is that with W, and two small ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .factor_type import factor_type
from .lazy_weights import LazyWeight, Product


@dataclass(frozen=True)
class LowRankTerm:
    """The term scale * left @ right of a sum, stored as the weight is.

    Args:
        left: Factor (..., a, rank).
        right: Factor (..., rank, b).
        scale: A number.
        dropout: Probability with which inputs of the first product are dropped.
    """

    left: Tensor
    right: Tensor
    scale: float
    dropout: float = 0.0

    @property
    def mT(self) -> LowRankTerm:  # noqa: N802
        """The term of the transposed weight."""
        return replace(self, left=self.right.mT, right=self.left.mT)

    def at(self, index: Any) -> LowRankTerm:
        """Return the term of the weights at an index."""
        return replace(self, left=self.left[index], right=self.right[index])

    def unbind(self) -> list[LowRankTerm]:
        """Return the terms of all weights; the gradient of all is put together once, not for each of them."""
        pairs = zip(self.left.unbind(), self.right.unbind(), strict=True)
        return [replace(self, left=left, right=right) for left, right in pairs]

    def full(self) -> Tensor:
        """Return the product of the factors."""
        if self.dropout:
            raise TypeError(
                "Dropout acts on inputs of experts, and this implementation of experts does not multiply them with the "
                "weight: set dropout to 0, or choose another one, model.set_experts_implementation('grouped_mm')."
            )
        return self.scale * (self.left @ self.right)

    def product(self, product: Product) -> Tensor:
        """Return the product with this term."""
        dtype = factor_type(product.x)
        left, right = self.left.to(dtype), self.right.to(dtype)
        if surplus := -left.shape[-1] % product.rank_multiple():
            left, right = F.pad(left, (0, surplus)), F.pad(right, (0, 0, 0, surplus))
        first, second = (left, right) if product.from_right else (right, left)
        x = F.dropout(product.x.to(dtype), self.dropout) if self.dropout else product.x.to(dtype)
        return product.times(product.times(x, first) * self.scale, second)


class LazySum(LazyWeight):
    """W + terms.

    Args:
        weight: The weight W, or what stands for it.
        terms: What is added.
    """

    def __init__(self, weight: Tensor | LazyWeight, *terms: LowRankTerm) -> None:
        self.weight, self.terms = weight, terms
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device

    def product(self, product: Product) -> Tensor:
        weight = self.weight
        y = weight.product(product) if isinstance(weight, LazyWeight) else product.with_weight(weight)
        for term in self.terms:
            y = y.add_(term.product(product))  # nothing else refers to the result of a product
        return y

    def full(self) -> Tensor:
        weight = self.weight.full() if isinstance(self.weight, LazyWeight) else self.weight
        for term in self.terms:
            weight = weight + term.full().to(weight.dtype)
        return weight

    def __getitem__(self, index: Any) -> LazySum:
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
        if one and not torch.compiler.is_compiling():
            return LazySum(self.weight[index], *[terms[int(index)] for terms in self._by_expert])
        return LazySum(self.weight[index], *[term.at(index) for term in self.terms])

    @cached_property
    def _by_expert(self) -> list[list[LowRankTerm]]:
        return [term.unbind() for term in self.terms]

    @property
    def mT(self) -> LazySum:  # noqa: N802
        return LazySum(self.weight.mT, *[term.mT for term in self.terms])

    def data_ptr(self) -> int:
        """Return the address of W on the CPU, where the alignment of a weight is looked at and no kernel reads it."""
        if self.device.type != "cpu":
            return int(self.__getattr__("data_ptr"))
        return int(self.weight.data_ptr())
