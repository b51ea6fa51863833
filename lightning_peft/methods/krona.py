"""``KronA``: Parameter Efficient Tuning with Kronecker Adapter, https://arxiv.org/abs/2212.10650."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import parameter_like
from ..core.method import Method
from ..core.updated_product import may_cache
from ..core.weight_update import WeightUpdate
from ..ops.factor_type import one_type
from ..ops.fused_linear import TINY_WEIGHT, WeightUpdateSpec, rebuilding_is_cheaper
from ..ops.parametrizations import KroneckerParametrization
from ..structure.layer_of import layer_of
from ..structure.rows import Rows
from ..structure.selection import select
from .families.kronecker import add_kronecker, check_kronecker, shape_of_a, start_factors, times_kronecker


@dataclass(frozen=True, kw_only=True)
class KronA(Method):
    """Trains Y = X W + s X (A kron B), with A (a1, a2) and B (b1, b2), a1 b1 = in and a2 b2 = out; B starts at zero.

    The rank is rank(A) rank(B), mostly far above that of LoRA with as many parameters. KronA adapts the same layers as
    LoRA; for a convolution, B has the kernel as trailing dimensions. KronA can be merged.

    Args:
        name: Name of the adapters on their hosts, and in files.
        targets: Globs on the end of module names, or roles. The paper adapts the query and value projections.
        exclude: Globs of modules to leave out.
        shape_a: a1 and a2; a1 divides the inputs of every target, a2 its outputs.
        factor: In place of ``shape_a``: a1 and a2 are the largest divisors up to this. With neither, a1 and a2 are
            those with the fewest parameters, close to the square roots.
        scale: Factor s of the update; 16 is a third party's default, not one from the paper.

    Raises:
        ValueError: ``shape_a`` does not divide a target's sides.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(64, 64)), lp.KronA(shape_a=[8, 8], targets=["0"]))
        >>> lp.summary(model).trainable  # A and B are 8 x 8; their Kronecker product is 64 x 64
        128
    """

    name: str = "krona"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention.query", "attention.value"])
    exclude: list[str] = dataclasses.field(default_factory=list)
    shape_a: list[int] | None = None
    factor: int | None = None
    scale: float = 16.0

    def __post_init__(self) -> None:
        check_kronecker(self.shape_a, self.factor, self.scale)

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, KronAUpdate]]:
        for name, host, rows in select(model, self.targets, self.exclude):
            out, inputs, *kernel = layer_of(host).shape(host, rows)
            shape = shape_of_a(name, inputs, out, self.shape_a, self.factor, math.prod(kernel))
            yield name, KronAUpdate(host, shape, self.scale, rows)


class KronAUpdate(WeightUpdate):
    """s (A kron B)^T, with A of shape (a1, a2) and B of shape (b1, b2, *kernel).

    Args:
        host: Layer to update.
        shape_a: a1, which divides the inputs, and a2, which divides the outputs.
        scale: Factor of the update.
        rows: Rows of a fused layer to update.
    """

    tensor_parallel_dims = {}

    def __init__(self, host: Any, shape_a: tuple[int, int], scale: float, rows: Rows | None = None) -> None:
        super().__init__(host, rows)
        (out, inputs, *kernel), (a1, a2), weight = self.shape, shape_a, self.layer.parameter(host)
        self.scale = scale
        self.a, self.b = parameter_like(weight, a1, a2), parameter_like(weight, inputs // a1, out // a2, *kernel)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start_factors(self.a, self.b)

    def delta(self) -> Tensor:
        return torch.einsum("ij,kl...->jlik...", self.a, self.b * self.scale).reshape(self.shape)

    def few_tokens_forward(self, host: Any, x: Tensor) -> Tensor | None:
        weight: Tensor = self.layer.read(host)
        if self.rows.size < self.host_rows or not one_type(x, weight, self.a):
            return None
        if not rebuilding_is_cheaper((), x, weight):
            return add_kronecker(F.linear(x, weight, host.bias), x, self.a, self.b, self.scale)
        if weight.numel() > TINY_WEIGHT or (weight.is_cpu and may_cache(self)):
            return None
        return F.linear(x, KroneckerParametrization(self.scale).updated(weight, self.a, self.b), host.bias)

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        if self.layer.maps_features and self.rows.size == self.host_rows:
            return add_kronecker(y, x, self.a, self.b, self.scale)
        return super().post_forward(host, x, y, *values)

    def update(self, host: Any, x: Tensor) -> Tensor:
        if self.layer.maps_features:
            return times_kronecker(x, self.a, self.b * self.scale)
        delta = self.delta()
        return self.layer.apply(host, x, delta.to(x.dtype) if x.is_floating_point() else delta)

    def as_parametrization(self) -> WeightUpdateSpec | None:
        return (
            WeightUpdateSpec(KroneckerParametrization(self.scale), self.rows.ends, (self.a, self.b))
            if self.b.dim() == 2
            else None
        )

    def extra_repr(self) -> str:
        return f"a={tuple(self.a.shape)}, b={tuple(self.b.shape)}, scale={self.scale:g}"
