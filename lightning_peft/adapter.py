"""What runs: an adapter is a module that surrounds the call of one other module, its host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import layer_of

Call = Callable[..., Any]


class Adapter(nn.Module, ABC):
    """Trainable module that surrounds the call of a host.

    Its tensors are created by ``parameter_like``: on the host's device, in float32 or wider. Casting the model to a
    narrower type later (``model.bfloat16()``, precision plugins) moves them but leaves their type: small factors
    trained in 16 bits lose their updates to rounding.
    """

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]

        def keep_width(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if tensor.is_floating_point() and new.is_floating_point() and new.element_size() < tensor.element_size():
                return tensor.to(device=new.device, copy=True)
            return new

        super()._apply(keep_width, recurse=False)  # type: ignore[no-untyped-call]
        return self


def parameter_like(weight: Tensor, *shape: int) -> nn.Parameter:
    """Return an uninitialized parameter on the device of a host's weight, in its type but never below float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
    return nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))


class WeightUpdate(Adapter):
    """Adds ``delta()`` to the weight of a linear layer: y = host(x) + update(x).

    Law: ``update(host, x) == layer_of(host).apply(host, x, delta())``.

    Args:
        host: Layer whose weight, seen as (out, in, *kernel), is updated.
        part: Name of the rows of a fused layer that are updated, with the first of them and the one after the last.
    """

    def __init__(self, host: nn.Module, part: tuple[str, int, int] | None = None) -> None:
        super().__init__()
        self.layer = layer_of(host)
        out, *rest = self.layer.shape(host)
        self.part, first, stop = part or ("", 0, out)
        self.shape = (stop - first, *rest)  # of delta()
        self.outside = (first, out - stop)  # rows before and after

    @abstractmethod
    def delta(self) -> Tensor:
        """Return the update of the weight (of its part), as (out, in, *kernel)."""

    @abstractmethod
    def update(self, host: Any, x: Tensor) -> Tensor:
        """Return the update of the output (of its part), the cheapest way this method has."""

    def forward(self, host: Any, inner: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = inner(x, *args, **kwargs)
        update = self.update(host, x)
        if any(self.outside):
            update = F.pad(update, self.outside)
        return y + update.to(y.dtype)

    def merge(self, host: Any) -> None:
        delta = self.delta().detach()
        if any(self.outside):
            delta = F.pad(delta, (*[0, 0] * (delta.dim() - 1), *self.outside))
        self.layer.add(host, delta)
