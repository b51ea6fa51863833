"""``hadamard_linear``: y = x W'^T with W' = W + W1 o W2, where backward builds W1 and W2 once, for all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd_function import apply_function
from .fused_linear import autocast_disabled
from .parametrizations import HadamardParametrization


def hadamard_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, form: HadamardParametrization, factors: Sequence[Tensor]
) -> Tensor:
    """Return x W'^T + bias for tensors of one type, without autocast and without a gradient of the weight.

    Values and gradients are those of ``F.linear(x, form.updated(weight, *factors), bias)``; autograd saves ``x`` alone.
    """
    return apply_function(_HadamardLinear, x, weight, bias, form, *factors)


class _HadamardLinear(torch.autograd.Function):
    """x W'^T + bias; saves x, W and the factors."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, form: HadamardParametrization, *factors: Tensor
    ) -> Tensor:
        return F.linear(x, form.updated(weight, *factors), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.form, *factors = inputs
        ctx.save_for_backward(x, weight, *factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        x, weight, *factors = ctx.saved_tensors
        flat = g.flatten(0, -2)
        with autocast_disabled(g):
            pair = ctx.form.pair(*factors)
            by_x = g @ torch.addcmul(weight, *pair) if ctx.needs_input_grad[0] else None
            by_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
            by_factors = ctx.form.gradients_by_weight(flat.t() @ x.flatten(0, -2), pair, factors)
        return by_x, None, by_bias, None, *by_factors
