"""``LoRAAdapter``: the update scale B A of one layer, with a trained length of each row for DoRA."""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.adapter import parameter_like
from ...ops.fused_linear import TINY_WEIGHT, WeightUpdateSpec
from ...ops.low_rank_products import decomposed_linear
from ...ops.parametrizations import DoRAParametrization, LowRankParametrization, magnitude_over_norm
from ...ops.sharded_tensors import full_tensor
from ...structure.rows import Rows
from .low_rank import LowRankUpdate
from .low_rank_start import FROM_WEIGHT, RANDOM

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]


class LoRAAdapter(LowRankUpdate):
    """scale B A, with A of shape (rank, in, *kernel) and B of shape (out, rank).

    Where both factors start from the weight, their product at the start is subtracted: scale (B A - B0 A0), so that the
    stored base is unchanged. With a magnitude m of shape (out,) the updated weight V becomes m V / ||V||, row by row.

    Args:
        host: Layer to update.
        rank: Rank of the update.
        scale: Factor of the update.
        dropout: Probability with which inputs are dropped in training; ignored where inputs are indices.
        rows: Rows of a fused layer to update.
        init: How the factors start; see ``LoRA``.
        decompose: Whether a magnitude is trained as well.
    """

    tensor_parallel_dims = {
        "a": (None, "in"),
        "a0": (None, "in"),
        "b": ("out", None),
        "b0": ("out", None),
        "magnitude": ("out",),
    }

    def __init__(
        self,
        host: Any,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        rows: Rows | None = None,
        init: Init = "kaiming",
        decompose: bool = False,
    ) -> None:
        super().__init__(host, scale, dropout, rows)
        out, *rest = self.shape
        self.init = init
        self.exclusive = decompose or self.updates_bias
        weight = self.layer.parameter(host)
        self.a, self.b = parameter_like(weight, rank, *rest), parameter_like(weight, out, rank)
        if init in FROM_WEIGHT:
            self.a0, self.b0 = (nn.Buffer(torch.empty_like(factor)) for factor in (self.a, self.b))
        self.magnitude = parameter_like(weight, out) if decompose else None
        if decompose and self.few_inputs and weight.numel() <= TINY_WEIGHT:
            self.few_inputs = sys.maxsize  # however many tokens there are, the updated weight is built
        self.kept_inputs = 0 if decompose else self.kept_inputs  # its norms cost more than to notice changes
        self.reset_parameters(host)

    def reset_parameters(self, host: Any = None) -> None:
        """Start with an update of zero; ``host`` is needed where the start depends on its weight."""
        if self.init in RANDOM and not self.a.is_meta:
            RANDOM[self.init](self.a, self.b, self.layer.is_embedding)
        if self.init in FROM_WEIGHT or self.magnitude is not None:
            self._start_from(host)

    @torch.no_grad()
    def _start_from(self, host: Any) -> None:
        if self.a.is_meta:
            return  # loading fills them, or this is called again once they have storage
        if host is None:
            raise TypeError(
                "decompose and the initial values pissa and olora are computed from the host's weight: load the base "
                "model first, then inject."
            )
        weight = self.rows.take(full_tensor(self.layer.read(host))).to(self.a.dtype).flatten(1)
        if self.init in FROM_WEIGHT:
            a, b = FROM_WEIGHT[self.init](weight, len(self.a), self.scale)
            for factor, value in ((self.a, a), (self.a0, a), (self.b, b), (self.b0, b)):
                factor.copy_(value.view(factor.shape))
        if self.magnitude is not None:
            # By the operator of the forward pass, so that the norm is equal to the last bit.
            v = LowRankParametrization(self.scale).updated(weight, self.a.flatten(1), self.b * 0)
            self.magnitude.copy_(torch.linalg.vector_norm(v, dim=1))

    def pair(self) -> tuple[Tensor, Tensor]:
        if self.init in FROM_WEIGHT:
            return torch.cat([self.a, self.a0]), torch.cat([self.b, -self.b0], 1)
        return self.a, self.b

    def updated(self, weight: Tensor) -> Tensor:
        v = weight + self.delta()
        if self.magnitude is None:
            return v
        return v * magnitude_over_norm(v, self.magnitude).view(-1, *[1] * (v.dim() - 1))

    def low_rank_output(self, x: Tensor, weight: Tensor, bias: Tensor | None, p: float) -> Tensor:
        if self.magnitude is None:
            return super().low_rank_output(x, weight, bias, p)
        return decomposed_linear(x, weight, bias, *self.pair(), self.magnitude, self.scale, p)

    def update(self, host: Any, x: Tensor) -> Tensor:
        if self.magnitude is None:
            return super().update(host, x)
        weight = self.rows.take(self.layer.read(host)).to(self.a.dtype)
        change = self.updated(weight) - weight
        return self.layer.apply(host, self.dropped(x), change.to(x.dtype) if x.is_floating_point() else change)

    def as_parametrization(self) -> WeightUpdateSpec | None:
        update = super().as_parametrization()
        if update is None or self.magnitude is None:
            return update
        return WeightUpdateSpec(DoRAParametrization(self.scale), self.rows.ends, (*update.factors, self.magnitude))

    def extra_repr(self) -> str:
        return f"rank={len(self.a)}, scale={self.scale:g}, dropout={self.dropout:g}"
