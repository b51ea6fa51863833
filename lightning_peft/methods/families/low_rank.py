"""``LowRankUpdate``: updates scale B A, where subclasses define the factors A and B."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.weight_update import WeightUpdate
from ...ops.autograd_function import records_gradients
from ...ops.factor_type import factor_type
from ...ops.fused_linear import WeightUpdateSpec, dropped_low_rank
from ...ops.parametrizations import LowRankParametrization
from ...structure.layer_types import LinearType
from ...structure.rows import Rows


class LowRankUpdate(WeightUpdate):
    """Adds scale B A to a weight, with A of shape (rank, in, *kernel) and B of shape (out, rank).

    Args:
        host: Layer to update.
        scale: Factor of the update.
        dropout: Probability with which inputs are dropped in training; ignored where inputs are indices.
        rows: Rows of a fused layer to update.
    """

    def __init__(self, host: Any, scale: float, dropout: float = 0.0, rows: Rows | None = None) -> None:
        super().__init__(host, rows)
        self.scale, self.dropout = scale, 0.0 if self.layer.is_embedding else dropout

    @abstractmethod
    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A and B."""

    def delta(self) -> Tensor:
        a, b = self.pair()
        return self.scale * (b @ a.flatten(1)).view(self.shape)

    def update(self, host: Any, x: Tensor) -> Tensor:
        if not self.layer.factorizes(host):
            return self.layer.apply(host, self.dropped(x), self.delta().to(x.dtype))
        a, b = self.pair()
        if self._drops() and isinstance(self.layer, LinearType):
            return dropped_low_rank(x, a, b, self.scale, self.dropout)
        if x.is_floating_point():
            dtype = factor_type(x)
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        return self.layer.apply_pointwise(host, self.layer.apply(host, self.dropped(x), a) * self.scale, b)

    def as_parametrization(self) -> WeightUpdateSpec | None:
        a, b = self.pair()
        if self._drops() or (records_gradients() and not a.requires_grad):  # B alone saves A x, and not x
            return None
        return WeightUpdateSpec(LowRankParametrization(self.scale), self.rows.ends, (a, b))

    def per_example_tensors(self) -> tuple[Any, ...]:
        if self.exclusive or (self.dropout and self.training) or not self.layer.maps_features:
            return ()
        return LowRankUpdate, *self.pair(), self.scale

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        if not values:
            return super().post_forward(host, x, y)
        a, b, scale = values
        b = self.rows.pad(b.mT, self.host_rows).mT if self.part else b
        dtype = factor_type(x)
        hidden, b = torch.bmm(x.to(dtype), a.to(dtype).mT), b.to(dtype)
        hidden = hidden if isinstance(scale, float) and scale == 1.0 else (hidden * scale).to(hidden.dtype)
        if y.dtype == hidden.dtype == b.dtype:
            return torch.baddbmm(y, hidden, b.mT)
        return (y + torch.bmm(hidden, b.mT)).to(y.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """Return inputs after dropout."""
        return F.dropout(x, self.dropout) if self._drops() else x

    def _drops(self) -> bool:
        return self.training and self.dropout > 0


def _kaiming(a: Tensor, b: Tensor, is_embedding: bool) -> None:
    if is_embedding:  # the factor that an index selects from starts at zero, as in the authors' code
        nn.init.zeros_(a)
        nn.init.normal_(b)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as the authors' code; the paper says Gaussian
        nn.init.zeros_(b)


def _gaussian(a: Tensor, b: Tensor, is_embedding: bool) -> None:
    random, zero = (b, a) if is_embedding else (a, b)
    nn.init.normal_(random, std=1 / len(a))
    nn.init.zeros_(zero)


@torch.no_grad()
def _orthogonal(a: Tensor, b: Tensor, is_embedding: bool) -> None:
    rank = len(a)
    basis = torch.linalg.qr(torch.randn(rank, rank, dtype=a.dtype, device=a.device)).Q
    basis_a, basis_b = basis[: (rank + 1) // 2], basis[(rank + 1) // 2 :]  # orthogonal, so that B A = 0
    inputs = torch.randn(len(basis_a), a[0].numel(), dtype=a.dtype, device=a.device)
    outputs = torch.randn(len(b), len(basis_b), dtype=b.dtype, device=b.device)
    a.copy_((basis_a.T @ inputs).view_as(a) / 10)
    b.copy_(outputs @ basis_b / 10)


def _pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


RANDOM = {"kaiming": _kaiming, "gaussian": _gaussian, "orthogonal": _orthogonal}  # fill A and B, so that B A = 0
FROM_WEIGHT = {"pissa": _pissa, "olora": _olora}  # A and B from a weight of shape (out, in), rank and scale
