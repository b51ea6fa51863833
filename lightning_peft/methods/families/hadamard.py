"""``HadamardUpdate``: the elementwise product of two low-rank matrices, which can have full rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import parameter_like
from ...core.updated_product import may_cache
from ...core.weight_update import WeightUpdate
from ...ops.autograd_function import records_gradients
from ...ops.factor_type import factor_type, one_type
from ...ops.fused_linear import TINY_WEIGHT, WeightUpdateSpec, rebuilding_is_cheaper
from ...ops.hadamard_linear import hadamard_linear
from ...ops.low_rank_products import low_rank_linear
from ...ops.parametrizations import HadamardParametrization, LowRankParametrization
from ...ops.torch_api import element_count
from ...structure.layer_types import LinearType
from ...structure.rows import Rows

# Measured as the time of forward and backward of square layers 64 to 512 wide at rank 2 to 16 and 1 to 128 tokens (one
# thread of an x86 CPU, torch 2.13, float32).
PAIR_TOKENS = 64  # tokens up to which a pair of as many numbers as the weight is cheaper than building the weight


class HadamardUpdate(WeightUpdate):
    """Adds f(W1) o (f(W2) + shift) with Wi = Xi Yi^T, Xi (out, rank) and Yi (in, rank); f is the identity or tanh.

    With cores, Wi of a convolution is Ti x1 Xi x2 Yi with Ti (rank, rank, *kernel); without, Yi has in * kernel rows.

    Args:
        host: Layer to update.
        rank: Rank of both matrices.
        tanh: Whether f is tanh.
        shift: Number added to the second matrix; with 1, it is a personal correction of the first.
        cores: Whether the matrices of a convolution have cores.
        observed: Whether to collect the gradient of the update in ``jacobian``, (out, in, *kernel), while training.
        rows: Rows of a fused layer to update.
    """

    tensor_parallel_dims = {"x1": ("out", None), "x2": ("out", None), "y1": ("in", None), "y2": ("in", None)}

    def __init__(
        self,
        host: Any,
        rank: int,
        tanh: bool = False,
        shift: float = 0.0,
        cores: bool = True,
        observed: bool = False,
        rows: Rows | None = None,
    ) -> None:
        super().__init__(host, rows)
        out, features, *kernel = self.shape
        self.form, self.observed, self.jacobian = HadamardParametrization(tanh, shift), observed, None
        self.local_tensors = ("x2", "y2", "t2") if shift else ()
        weight = self.layer.parameter(host)
        columns = features if cores else features * math.prod(kernel)
        self.x1, self.x2 = (parameter_like(weight, out, rank) for _ in range(2))
        self.y1, self.y2 = (parameter_like(weight, columns, rank) for _ in range(2))
        has_cores = bool(kernel) and cores
        self.t1, self.t2 = (parameter_like(weight, rank, rank, *kernel) if has_cores else None for _ in range(2))
        self.terms = rank * (rank + 1 if shift else rank)
        cheap = 2 * self.terms * (out + features) < out * features
        self.skinny = not tanh and ((cheap and isinstance(self.layer, LinearType)) or self.layer.is_embedding)
        self.reset_parameters()

    jacobian: Tensor | None

    def reset_parameters(self) -> None:
        """Start with an update of zero: X1 zero, the others normal by He et al., with the authors' fan-ins."""
        for factor in self.factors():
            fan_in = math.prod(factor.shape[1:]) if factor.dim() > 2 else len(factor)
            nn.init.normal_(factor, std=math.sqrt(2 / fan_in))
        nn.init.zeros_(self.x1)

    def factors(self) -> tuple[Tensor, ...]:
        """Return X1, Y1, X2, Y2 and, with cores, T1 and T2."""
        cores = (self.t1, self.t2) if self.t1 is not None and self.t2 is not None else ()
        return self.x1, self.y1, self.x2, self.y2, *cores

    def composed(self, *factors: Tensor) -> Tensor:
        """Return the update composed of these factors, of shape (out, in, *kernel)."""
        x1, y1, x2, y2, *cores = factors
        if not cores:
            w1, w2 = self.form.pair(x1, y1, x2, y2)
        else:
            t1, t2 = cores
            w1, w2 = (torch.einsum("ab...,oa,ib->oi...", t, x, y) for t, x, y in ((t1, x1, y1), (t2, x2, y2)))
            w1, w2 = self.form.apply_nonlinearity(w1, w2)
        return (w1 * w2).view(self.shape)

    def delta(self) -> Tensor:
        return self.composed(*self.factors())

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A and B with B A = W1 o (W2 + shift): the products of each column of X1 and Y1 with each of X2, Y2."""
        x2: Tensor = self.x2
        y2: Tensor = self.y2
        if self.form.shift:  # as one more column of ones
            x2, y2 = (torch.cat([t, t.new_ones(len(t), 1)], 1) for t in (x2, y2))
        x, y = ((t1[:, :, None] * t2[:, None]).flatten(1) for t1, t2 in ((self.x1, x2), (self.y1, y2)))
        return y.T, x

    def few_tokens_forward(self, host: Any, x: Tensor) -> Tensor | None:
        weight: Tensor = self.layer.read(host)
        if self._observes() or self.rows.size < self.host_rows or not one_type(x, weight, self.x1):
            return None
        keeps_weight = weight.is_cpu and may_cache(self)
        takes_pair = self.skinny if keeps_weight else self._takes_pair(element_count(x) // weight.shape[1])
        if takes_pair and weight.numel() > TINY_WEIGHT:
            a, b = self.pair()
            few = not rebuilding_is_cheaper((), x, weight)
            return low_rank_linear(x, weight, host.bias, a, b, 1.0) if few else None
        if keeps_weight or (records_gradients() and weight.requires_grad):
            return None
        return hadamard_linear(x, weight, host.bias, self.form, self.factors())

    def _takes_pair(self, tokens: int) -> bool:
        """Return whether ``pair`` is cheaper for a linear layer than W1 and W2, with no more saved than a weight."""
        out, features = self.shape
        numbers = self.terms * (out + features + tokens)
        return self.skinny or (tokens <= PAIR_TOKENS and not self.form.tanh and numbers <= out * features)

    def update(self, host: Any, x: Tensor) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else self.x1.dtype
        if self.skinny and not self._observes():
            if x.is_floating_point():
                dtype = factor_type(x)
                x = x.to(dtype)
            a, b = (factor.to(dtype) for factor in self.pair())
            return self.layer.apply_pointwise(host, self.layer.apply(host, x, a), b)
        delta = self.delta()
        if self._observes():
            delta.register_hook(self._observe)  # type: ignore[no-untyped-call]
        return self.layer.apply(host, x, delta.to(dtype))

    def as_parametrization(self) -> WeightUpdateSpec | None:
        if self._observes() or not isinstance(self.layer, LinearType):
            return None
        if self.skinny:
            return WeightUpdateSpec(LowRankParametrization(1.0), self.rows.ends, self.pair())
        return WeightUpdateSpec(self.form, self.rows.ends, self.factors())

    def _observes(self) -> bool:
        return self.observed and self.training and torch.is_grad_enabled()

    def _observe(self, gradient: Tensor) -> None:
        self.jacobian = gradient.detach() if self.jacobian is None else self.jacobian + gradient.detach()

    def extra_repr(self) -> str:
        return f"rank={self.x1.shape[1]}, tanh={self.form.tanh}, shift={self.form.shift:g}"
