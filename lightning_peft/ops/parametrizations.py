"""``Parametrization``: how factors update a weight ``w`` of shape (out, in), and the gradients of the factors.

Gradients are computed from the gradient ``g`` of the output, of shape (tokens, out), and the input ``x``, of shape
(tokens, in). The gradient of the full weight is formed only where the gradients of the factors are not cheaper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Parametrization(ABC):
    """Update of a weight by factors."""

    saves_output = False  # whether gradients are computed from the output as well
    rebuilds_full_weight = False  # whether the update alone costs as much as the layer, so that one product is cheaper

    @abstractmethod
    def updated(self, w: Tensor, *factors: Tensor) -> Tensor:
        """Return the updated weight."""

    @abstractmethod
    def gradients(self, g: Tensor, x: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        """Return the gradients of the factors."""


@dataclass(frozen=True)
class LowRankParametrization(Parametrization):
    """W + scale B A, with A (rank, in) and B (out, rank)."""

    scale: float

    def updated(self, w: Tensor, *factors: Tensor) -> Tensor:
        a, b = factors
        return torch.addmm(w, b, a, alpha=self.scale)

    def gradients(self, g: Tensor, x: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        a, b = (factor.to(g.dtype) for factor in factors)
        return ((g @ b).T @ x) * self.scale, ((x @ a.T).T @ g).T * self.scale


@dataclass(frozen=True)
class DoRAParametrization(LowRankParametrization):
    """m (W + scale B A) / ||W + scale B A||, row by row; the norm counts as constant in gradients, as in the paper."""

    saves_output = True
    rebuilds_full_weight = True

    def updated(self, w: Tensor, *factors: Tensor) -> Tensor:
        a, b, magnitude = factors
        v = super().updated(w, a, b)
        return v.mul_(magnitude_over_norm(v, magnitude)[:, None])

    def gradients(self, g: Tensor, x: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        """Return the gradients; ``factors`` are A, B, m and, after them, the weight, the output and the bias."""
        a, b, magnitude, w, y, bias = factors
        c = magnitude_over_norm(super().updated(w, a, b), magnitude)[:, None]
        by_a, by_b = super().gradients(g, x, a, c * b)
        by_rows = sum_over_tokens(g, y, bias).to(a.dtype)
        by_magnitude = (by_rows / magnitude).masked_fill(magnitude == 0, 0)  # m of a zero row starts and stays at 0
        return by_a, by_b * c, by_magnitude


def sum_over_tokens(g: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sums over tokens of g (y - bias)."""
    total = g.new_zeros(g.shape[1], dtype=torch.promote_types(g.dtype, torch.float32))
    if g.device.type != "cpu" or torch.compiler.is_compiling():  # a loop would be compiled for one number of tokens
        return _add_sum(total, g, y, bias)
    # On the CPU, chunks stay in its cache; a full-size product would be written to memory and read again.
    for g_chunk, y_chunk in zip(torch.split(g, 256), torch.split(y, 256), strict=True):
        total = _add_sum(total, g_chunk, y_chunk, bias)
    return total


def _add_sum(total: Tensor, g: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    ones = g.new_ones(1, len(g))  # a product with ones sums columns faster than sum(0)
    total = total + (ones @ (g * y)).squeeze(0)
    return total if bias is None else total - (ones @ g).squeeze(0) * bias


def magnitude_over_norm(v: Tensor, magnitude: Tensor) -> Tensor:
    """Return m / ||v|| of each row of ``v``; no gradient flows through the norm."""
    return magnitude / row_norms(v.detach().flatten(1))


def row_norms(v: Tensor) -> Tensor:
    """Return the norm of each row of a matrix, but at least the smallest number that one can be divided by."""
    norm: Tensor = torch.linalg.vector_norm(v, dim=1)
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


@dataclass(frozen=True)
class HadamardParametrization(Parametrization):
    """W + f(X1 Y1^T) o (f(X2 Y2^T) + shift), with Xi (out, rank), Yi (in, rank), f the identity or tanh."""

    rebuilds_full_weight = True
    tanh: bool
    shift: float

    def updated(self, w: Tensor, *factors: Tensor) -> Tensor:
        return torch.addcmul(w, *self.pair(*factors))

    def pair(self, x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(X1 Y1^T) and f(X2 Y2^T) + shift."""
        return self.apply_nonlinearity(x1 @ y1.T, x2 @ y2.T)

    def apply_nonlinearity(self, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(W1) and f(W2) + shift."""
        if self.tanh:
            w1, w2 = w1.tanh(), w2.tanh()
        return w1, w2 + self.shift if self.shift else w2

    def gradients(self, g: Tensor, x: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        pair = self.pair(*factors)
        return self.gradients_by_weight((g.T @ x).to(pair[0].dtype), pair, factors)

    def gradients_by_weight(
        self, by_weight: Tensor, pair: tuple[Tensor, Tensor], factors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the gradients of the factors from that of the whole weight and what ``pair`` returned."""
        (w1, w2), (x1, y1, x2, y2) = pair, factors
        by_w1, by_w2 = by_weight * w2, by_weight * w1
        if self.tanh:
            by_w1, by_w2 = by_w1 * (1 - w1.square()), by_w2 * (1 - (w2 - self.shift).square())
        return by_w1 @ y1, by_w1.T @ x1, by_w2 @ y2, by_w2.T @ x2


@dataclass(frozen=True)
class KroneckerParametrization(Parametrization):
    """W + scale (A kron B)^T, with A (a1, a2) and B (b1, b2), a1 b1 = in and a2 b2 = out."""

    scale: float

    def updated(self, w: Tensor, *factors: Tensor) -> Tensor:
        (a1, a2), (b1, b2) = (factor.shape for factor in factors)
        a, b = factors
        grid = w.reshape(a2, b2, a1, b1)
        return torch.addcmul(grid, a.T[:, None, :, None], b.T[:, None, :], value=self.scale).reshape(w.shape)

    def gradients(self, g: Tensor, x: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        a, b = (factor.to(g.dtype) for factor in factors)
        (a1, a2), (b1, b2), tokens = a.shape, b.shape, len(x)
        xs = x.view(tokens, a1, b1).transpose(0, 1).reshape(a1, tokens * b1)
        gs = g.reshape(tokens, a2, b2).transpose(0, 1).reshape(a2 * tokens, b2)
        by_a = xs @ (gs @ b.T).view(a2, tokens * b1).T
        by_b = (a.T @ xs).view(a2 * tokens, b1).T @ gs
        return by_a * self.scale, by_b * self.scale
