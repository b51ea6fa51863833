"""``WeightUpdate``: adapters that train another weight, or bias, for a linear layer, of any type and for any rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.fused_linear import WeightUpdateSpec
from ..structure.layer_of import layer_of
from ..structure.rows import Rows
from .adapter import Adapter, Call, InnerCall
from .per_row import BatchableLayerAdapter
from .updated_product import updated_product
from .weight_cache import WeightCache


class WeightUpdate(BatchableLayerAdapter, Adapter):
    """Trains W' instead of the weight W of a linear layer: y = host(x) + x (W' - W)^T, or x W'^T at once where cheaper.

    A subclass defines ``delta()``, for W' = W + delta(), or ``updated(weight)``, for any W'; besides them, or alone,
    ``updated_bias(bias)`` for another bias. Everything else follows: embeddings, convolutions, quantized layers, rows
    of fused layers, torch's attention, merging and files. ``update``, ``as_parametrization`` and ``factor_tensors`` may
    say how the same is computed faster: ``update(host, x) == layer.apply(host, x, updated(w) - w)`` with the rows ``w``
    of the weight.

    Args:
        host: Layer whose weight, seen as (out, in, *kernel), is updated.
        rows: Rows of a fused layer that are updated, as ``select`` returned them; None for all.

    Raises:
        TypeError: The subclass defines none of ``delta``, ``updated`` and ``updated_bias``, or the layer's type is not
            known.

    Examples:
        >>> class RowScale(lp.WeightUpdate):
        ...     def __init__(self, host, rows):
        ...         super().__init__(host, rows)
        ...         self.scale = nn.Parameter(torch.empty(self.shape[0], 1))
        ...         self.reset_parameters()
        ...
        ...     def reset_parameters(self):
        ...         nn.init.ones_(self.scale)
        ...
        ...     def updated(self, weight):
        ...         return self.scale * weight
        >>> RowScale(nn.Linear(16, 8), None).scale.shape  # a number for each output
        torch.Size([8, 1])
    """

    rows: Rows

    def __init__(self, host: nn.Module, rows: Rows | None = None) -> None:
        super().__init__()
        cls = type(self)
        self.updates_bias = cls.updated_bias is not WeightUpdate.updated_bias
        self.updates_weight = cls.delta is not WeightUpdate.delta or cls.updated is not WeightUpdate.updated
        if not (self.updates_bias or self.updates_weight):
            raise TypeError(f"{cls.__name__} must define delta(), updated(weight) or updated_bias(bias).")
        self.layer = layer_of(host)
        self.weight_cache: WeightCache | None = None  # in evaluation on the CPU alone
        out, *rest = self.layer.shape(host)
        self.rows = rows or Rows("", 0, out)
        self.part = self.rows.part
        self.host_rows = out
        self.shape = (self.rows.size, *rest)  # of the rows, and so of delta()
        # W' and b' need not be sums, in which updates commute.
        self.exclusive = cls.updated is not WeightUpdate.updated or self.updates_bias

    def delta(self) -> Tensor:
        """Return W' - W of the rows, as (out, in, *kernel)."""
        raise TypeError(f"The update of {type(self).__name__} depends on the weight; call updated(weight).")

    def updated(self, weight: Tensor) -> Tensor:
        """Return W' for rows W of a weight, as (out, in, *kernel)."""
        return weight + self.delta()

    def updated_bias(self, bias: Tensor | None) -> Tensor:
        """Return b' for the bias b of the rows, of shape (out,); b is None where the layer has none."""
        raise TypeError(f"{type(self).__name__} does not change the bias.")

    def update(self, host: Any, x: Tensor) -> Tensor:
        """Return the difference that the update makes to the output of the rows; the bias is no part of it."""
        if type(self).updated is WeightUpdate.updated:
            change = self.delta()
        else:
            weight = self._read_rows(host)
            change = self.updated(weight) - weight
        return self.layer.apply(host, x, change.to(x.dtype) if x.is_floating_point() else change)

    def as_parametrization(self) -> WeightUpdateSpec | None:
        """Return (parametrization, rows, factors) for one product with the updated weight; None to use ``update``."""
        return None

    def factor_tensors(self) -> Sequence[Tensor]:
        """Return the tensors on which the update depends."""
        return [*self.parameters(), *self.buffers()]

    def train(self, mode: bool = True) -> WeightUpdate:
        if mode:
            self.invalidate_cache()
        return super().train(mode)

    def invalidate_cache(self) -> None:
        self.weight_cache = None

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        if self.layer.weight_read_by_parent:
            return inner(*args, **kwargs)  # the host reads its weight, a property that returns the updated one
        return self._forward(host, inner, *args, **kwargs)

    def _forward(self, host: Any, inner: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (product := self._fused_forward(host, inner, x)) is not None:
            return product
        y = inner(x, *args, **kwargs)
        y = self.post_forward(host, x, y) if self.updates_weight else y
        return y + self._bias_change(host).to(y.dtype) if self.updates_bias else y

    def _bias_change(self, host: Any) -> Tensor:
        bias = self.layer.bias(host)
        updated = self._whole_bias(bias)
        change = updated if bias is None else updated - bias
        return change.view(-1, *[1] * (len(self.shape) - 2))  # features, and the dimensions of a kernel behind them

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        return (y + self.pad_to_host_output(host, self.update(host, x))).to(y.dtype)

    def pad_to_host_output(self, host: Any, update: Tensor) -> Tensor:
        """Pad the output of the rows with zeros to the width of the host's output."""
        return self.rows.pad(update, self.host_rows)

    def _fused_forward(self, host: Any, inner: Call, x: Tensor) -> Tensor | None:
        """Return the output of the host with this adapter and the others; None to add to what ``inner`` returns.

        That needs a host whose forward is a plain product, and more than one vector.
        """
        if not isinstance(inner, InnerCall) or x.dim() < 2 or not self.layer.is_plain_matmul(host, inner.forward):
            return None
        if not inner.adapters:
            if (y := self.few_tokens_forward(host, x)) is not None:
                return y
            return updated_product(host, (self,), x)
        adapters = [*inner.adapters, self]
        if all(isinstance(adapter, WeightUpdate) for adapter in adapters):
            return updated_product(host, adapters, x)
        return None

    def few_tokens_forward(self, host: Any, x: Tensor) -> Tensor | None:
        """Return the output of a host whose forward is a plain product, where few tokens make that cheaper; else None.

        It is called where no other adapter of the host is active.
        """
        return None

    def effective_weight(self, weight: Tensor) -> Tensor:
        if not self.updates_weight:
            return weight
        return self.rows.put(weight, self.updated(self.rows.take(weight)).to(weight.dtype))

    def effective_bias(self, bias: Tensor | None) -> Tensor | None:
        return self._whole_bias(bias) if self.updates_bias else bias

    def _whole_bias(self, bias: Tensor | None) -> Tensor:
        """Return the host's bias with that of the rows updated."""
        if bias is None:
            return self.rows.pad(self.updated_bias(None), self.host_rows)
        return self.rows.put(bias, self.updated_bias(self.rows.take(bias)).to(bias.dtype))

    @torch.no_grad()
    def merge(self, host: Any) -> None:
        if self.updates_bias:
            self.layer.write_bias(host, self._whole_bias(self.layer.bias(host)))  # first, since it may refuse
        if self.updates_weight:
            for first, rows in self.rows.split(self.updated(self._read_rows(host))):
                self.layer.write(host, rows, first)

    def _read_rows(self, host: Any) -> Tensor:
        """Return the rows W of the weight of a host, in float32 or wider."""
        weight = self.rows.take(self.layer.read(host))
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
