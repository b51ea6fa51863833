"""``LowRankUpdate``: updates scale B A, where subclasses define the factors A and B."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...core.updated_product import may_cache
from ...core.weight_update import WeightUpdate
from ...ops.autograd_function import records_gradients
from ...ops.factor_type import factor_type
from ...ops.fused_linear import WeightUpdateSpec
from ...ops.low_rank_products import FLOAT_MASK, dropped_low_rank, few_inputs, kept_inputs, low_rank_linear
from ...ops.parametrizations import LowRankParametrization
from ...ops.torch_api import element_count
from ...structure.layer_types import LinearType
from ...structure.rows import Rows

_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # types of inputs that can be flattened


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
        whole = self.layer.maps_features and self.rows.size == self.host_rows and not self.updates_bias
        self.few_inputs, self.kept_inputs = (few_inputs(*self.shape), kept_inputs(*self.shape)) if whole else (0, 0)

    @abstractmethod
    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A and B."""

    def delta(self) -> Tensor:
        a, b = self.pair()
        return self.scale * (b @ a.flatten(1)).view(self.shape)

    def few_tokens_forward(self, host: Any, x: Tensor) -> Tensor | None:
        p, count = self.dropout if self.training else 0.0, element_count(x)
        limit = min(self.few_inputs, FLOAT_MASK) if p else self.few_inputs
        if count >= limit or x.dtype == torch.float16 or type(x) not in _PLAIN:
            return None
        if count >= self.kept_inputs and may_cache(self):
            return None
        return self.low_rank_output(x, self.layer.read(host), host.bias, p)

    def low_rank_output(self, x: Tensor, weight: Tensor, bias: Tensor | None, p: float) -> Tensor:
        """Return what a linear layer with this update returns, by small products, with dropout p of its inputs."""
        return low_rank_linear(x, weight, bias, *self.pair(), self.scale, p)

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
