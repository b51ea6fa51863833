"""What runs: an adapter is a module that surrounds the call of one other module, its host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.fused_linear import WeightUpdateSpec, rebuilding_is_cheaper, updated_linear, updated_weight
from ..structure.layer_types import layer_of
from .per_row import BatchableLayerAdapter
from .weight_cache import WeightCache

Call = Callable[..., Any]
Axes = tuple[str | None, ...]


class Adapter(nn.Module, ABC):
    """Trainable module that surrounds the call of a host.

    Its tensors are created by ``parameter_like``: on the host's device, in float32 or wider. Casting the model to a
    narrower type later (``model.bfloat16()``, precision plugins) moves them but leaves their type: small factors
    trained in 16 bits lose their updates to rounding. Who wants them narrow sets ``parameter.data``.
    """

    exclusive = False  # whether no other adapter may update the same rows of its host's weight
    replaces: Sequence[str] = ()  # names of the host's own parameters that others take the place of, in calls
    unmergeable = "no weight of the host expresses it"  # why, where ``merge`` is not implemented
    local_tensors: tuple[str, ...] = ()  # names of tensors that stay with a client in federated training
    plot_tensors: Mapping[
        str, str
    ] = {}  # names of tensors by what ``plots`` makes of them: ``ranks``, ``gates``, ``tokens``
    # Under tensor parallelism: what each tensor's dimensions run along, the host's "out" or "in", or neither (None), as
    # it is for those left out. None for all: it does not compute the same there.
    tensor_parallel_dims: Mapping[str, Axes] | None = None
    persistent = True  # whether it is a part of the model, and not there for the time of a run alone
    part = ""  # which part of a host this adapter serves, where a method puts several on one host

    @abstractmethod
    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        """Return what the host shall return; ``inner(*args, **kwargs)`` is the host's own result."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Fill the tensors with their initial values; deferred initialization calls it once they are real."""

    def merge(self, host: Any) -> None:
        """Fold this adapter into the host's parameters, in place, if a weight can express it."""
        raise NotImplementedError

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Return what a host that is read, and not called, shows for its weight, as it stores it."""
        return weight

    def effective_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return what such a host shows for its bias."""
        return bias

    def invalidate_cache(self) -> None:
        """Forget what was computed for the company on the host, which is another from now on."""

    def finalize(self) -> None:
        """Replace what only training needs by what ``export_state`` returns, as parameters of these names."""

    def export_state(self) -> dict[str, Tensor]:
        """Return what an adapter file holds of this adapter."""
        return self.state_dict(keep_vars=True)

    def import_state(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state that ``export_state`` gave this for."""
        return dict(packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        def keep_width(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if tensor.is_floating_point() and new.is_floating_point() and new.element_size() < tensor.element_size():
                return tensor.to(device=new.device, copy=True)
            return new

        super()._apply(keep_width, recurse)  # type: ignore[no-untyped-call]
        return self


def parameter_like(weight: Tensor, *shape: int) -> nn.Parameter:
    """Return an uninitialized parameter on the device of a host's weight, in its type but never below float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
    return nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))


class WeightUpdate(BatchableLayerAdapter, Adapter):
    """Trains a linear layer's weight: y = host(x) + update(x), or one product with the updated weight, by cost.

    Laws: ``update(host, x) == layer.apply(host, x, d)`` with ``d = updated(w) - w`` of this part's rows ``w``, and
    ``updated(w) == w + delta()`` unless a method says otherwise.

    Args:
        host: Layer whose weight, seen as (out, in, *kernel), is updated.
        part: Name of the rows of a fused layer that are updated, with the first of them and the one after the last.
    """

    def __init__(self, host: nn.Module, part: tuple[str, int, int] | None = None) -> None:
        super().__init__()
        self.layer, self.built = layer_of(host), WeightCache()
        out, *rest = self.layer.shape(host)
        self.rows = (0, out)
        if part is not None:
            self.part, self.rows = part[0], part[1:]
        self.shape = (self.rows[1] - self.rows[0], *rest)  # of delta()

    @abstractmethod
    def delta(self) -> Tensor:
        """Return the update of the weight (of its part), as (out, in, *kernel)."""

    @abstractmethod
    def update(self, host: Any, x: Tensor) -> Tensor:
        """Return the update of the output (of its part), the cheapest way this method has."""

    def updated(self, weight: Tensor) -> Tensor:
        """Return what becomes of a weight (of its part), as (out, in, *kernel)."""
        return weight + self.delta()

    def as_parametrization(self) -> WeightUpdateSpec | None:
        """Return what one product with the updated weight needs; None where only ``update`` will do."""
        return None

    def factor_tensors(self) -> Sequence[Tensor]:
        """Return the tensors that the update is made of."""
        return [*self.parameters(), *self.buffers()]

    def train(self, mode: bool = True) -> WeightUpdate:
        if mode:
            self.built.drop()
        return super().train(mode)

    def invalidate_cache(self) -> None:
        self.built.drop()

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        if self.layer.weight_read_by_parent:
            return inner(*args, **kwargs)  # the host reads its weight, and finds the updated one
        return self._called(host, inner, *args, **kwargs)

    def _called(self, host: Any, inner: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (product := self._fused_forward(host, inner, x)) is not None:
            return product
        return self.post_forward(host, x, inner(x, *args, **kwargs))

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        return y + self.pad_to_host_output(host, self.update(host, x)).to(y.dtype)

    def pad_to_host_output(self, host: Any, update: Tensor) -> Tensor:
        """Return the update of an output's part as that of all of it."""
        first, stop = self.rows
        return F.pad(update, (first, self.layer.shape(host)[0] - stop)) if self.part else update

    def _fused_forward(self, host: Any, inner: Call, x: Tensor) -> Tensor | None:
        """Return the host's output with this adapter and those further inside, if that is one product and cheaper."""
        chain, call = [self], inner
        while isinstance(called := getattr(call, "func", None), WeightUpdate):
            chain.append(called)
            call = call.args[1]  # type: ignore[attr-defined]
        if not self.layer.is_plain_matmul(host, called) or (torch.is_grad_enabled() and host.weight.requires_grad):
            return None
        if not (torch.is_grad_enabled() or self.training or torch.compiler.is_compiling()) and host.weight.is_cpu:
            return self._cached_forward(host, chain, x)
        if (updates := self._updates(host, chain)) and rebuilding_is_cheaper(updates, x, self.layer.read(host)):
            return updated_linear(x, self.layer.read(host), host.bias, updates)
        return None

    def _updates(self, host: Any, chain: Sequence[WeightUpdate]) -> list[WeightUpdateSpec]:
        """Return the updates of all these adapters, inner before outer; none if one cannot be had in this form."""
        found = [one.as_parametrization() for one in reversed(chain)]
        updates = [update for update in found if update is not None]
        # In 16 bits, a weight would round small updates away; so would factors that sharding has cast down with it.
        wide = host.weight.dtype in (torch.float32, torch.float64)
        exact = wide and all(factor.dtype == host.weight.dtype for update in updates for factor in update.factors)
        return updates if exact and len(updates) == len(chain) else []

    def _cached_forward(self, host: Any, chain: Sequence[WeightUpdate], x: Tensor) -> Tensor | None:
        factors = [factor for one in chain for factor in one.factor_tensors()]
        weight = self.built.find(host.weight, factors)
        if weight is None:
            if not (updates := self._updates(host, chain)):
                return None
            weight = updated_weight(self.layer.read(host), updates)
            self.built.keep(host.weight, factors, weight)
            if self.built.weight is None and not rebuilding_is_cheaper(updates, x, weight):
                return None
        return F.linear(x, weight, host.bias)

    def effective_weight(self, weight: Tensor) -> Tensor:
        first, stop = self.rows
        return torch.cat([weight[:first], self.updated(weight[first:stop]).to(weight.dtype), weight[stop:]])

    def merge(self, host: Any) -> None:
        weight = self.layer.read(host)
        wide = weight[slice(*self.rows)].to(torch.promote_types(weight.dtype, torch.float32))
        self.layer.write(host, self.updated(wide).detach(), self.rows[0])
