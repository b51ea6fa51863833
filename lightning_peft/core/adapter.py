"""``Adapter``: a module called in place of a base module, its host; it receives the host's forward as ``inner``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..files.allocation_limit import check_allocation
from ..structure.rows import Rows

Call = Callable[..., Any]
Axes = tuple[str | None, ...]


class Adapter(nn.Module, ABC):
    """Trainable module that surrounds the call of a host: y = adapter(host, inner, x), with inner(x) the host's result.

    Create its tensors by ``parameter_like``: on the host's device, in float32 or wider. Casting the model to a
    narrower type later (``model.bfloat16()``, precision plugins) moves them but keeps their type, since small factors
    that are trained in 16 bits lose their updates to rounding. Set ``parameter.data`` to make one narrow.

    Examples:
        >>> from lightning_peft.core import parameter_like
        >>> class Gate(lp.Adapter):
        ...     def __init__(self, host):
        ...         super().__init__()
        ...         self.gate = parameter_like(host.weight, 1)
        ...         self.reset_parameters()
        ...
        ...     def reset_parameters(self):
        ...         nn.init.ones_(self.gate)
        ...
        ...     def forward(self, host, inner, x):
        ...         return self.gate * inner(x)
    """

    exclusive = False
    """Whether no other adapter may update the same rows of its host's weight."""
    merges_ties = False
    """Whether its merge is right where modules share the host's weight: each of them has an adapter that says so."""
    replaces: Sequence[str] = ()
    """Names of parameters of the host in whose place the adapter's tensors are used during calls."""
    replaced_tensors: Sequence[str] = ()
    """The same, and names of buffers. While the adapter is active, whoever reads them from the host gets
    ``replacement``; the host's own stay as they are."""
    unmergeable = "its class defines no merge"
    """Reason that the error message gives where ``merge`` is not implemented."""
    local_tensors: tuple[str, ...] = ()
    """Names of tensors that stay with a client in federated training."""
    plot_tensors: Mapping[str, str] = {}
    """Names of tensors by the figure of ``lightning_peft.plots`` that shows them: ``ranks``, ``gates``, ``tokens``."""
    tensor_parallel_dims: Mapping[str, Axes] | None = None
    """For each tensor, which side of the host's weight each dimension runs along: ``"out"``, ``"in"`` or None.
    Tensors that are left out run along neither. None for the whole mapping: not supported under tensor parallelism."""
    persistent = True
    """Whether it is part of the model and its files; temporary adapters exist during one run only."""
    merges_bias_alone = False
    """Whether ``merge`` changes the host's bias and leaves its weight as it is."""
    part = ""
    """Suffix of its key where a method puts several adapters on one host."""
    rows: Rows | None = None
    """First row, and row after the last one, of the host's weight that it changes; None for the host's whole output."""

    @abstractmethod
    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the host; ``inner(*args, **kwargs)`` computes the host without this adapter."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Fill the tensors with their initial values; deferred initialization calls it once they have storage."""

    def merge(self, host: Any) -> None:
        """Fold this adapter into the parameters of the host, in place, if a weight can express it."""
        raise NotImplementedError

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Return the changed weight of a host that is never called because its parent reads ``.weight``.

        ``nn.MultiheadAttention`` does so. Without an override an adapter is refused on such a host.
        """
        return weight

    def effective_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the changed bias of such a host."""
        return bias

    def replacement(self, name: str, stored: Tensor) -> Tensor:
        """Return the tensor in the place of the host's ``stored`` one, for a name in ``replaced_tensors``."""
        return stored

    def assign_replacement(self, name: str, value: Tensor) -> None:
        """Take a value that the host assigns to a buffer which this adapter replaces."""
        raise NotImplementedError

    def invalidate_cache(self) -> None:
        """Drop cached values; called when the set of active adapters on the host has changed."""

    def finalize(self) -> None:
        """Replace parameters that only training needs by the tensors of ``export_state``, under their names."""

    def export_state(self) -> dict[str, Tensor]:
        """Return the tensors of this adapter that an adapter file holds."""
        return self.state_dict(keep_vars=True)

    def import_state(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict for which ``export_state`` returned ``packed``."""
        return dict(packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Move tensors as ``nn.Module`` does, but keep the type where ``fn`` would make it narrower."""

        def keep_width(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if tensor.is_floating_point() and new.is_floating_point() and new.element_size() < tensor.element_size():
                return tensor.to(device=new.device, copy=True)
            return new

        super()._apply(keep_width, recurse)  # type: ignore[no-untyped-call]
        return self


class InnerCall:
    """Call of a host without the outermost adapters: ``inner(*args, **kwargs)`` runs the adapters that remain.

    Args:
        host: The adapted module.
        forward: Forward function of the host's own class.
        adapters: The remaining adapters, inner before outer. Adapters read them to compute several at once.

    Examples:
        >>> from lightning_peft.core import InnerCall
        >>> class Twice(lp.Adapter):
        ...     def forward(self, host, inner, x):
        ...         return 2 * inner(x)
        ...
        ...     def reset_parameters(self):
        ...         pass
        >>> call = InnerCall(nn.Identity(), nn.Identity.forward, [Twice(), Twice()])
        >>> call(torch.ones(1)), call.without_outermost()(torch.ones(1))
        (tensor([4.]), tensor([2.]))
    """

    __slots__ = ("adapters", "forward", "host")

    def __init__(self, host: Any, forward: Call, adapters: Sequence[Adapter]) -> None:
        self.host, self.forward, self.adapters = host, forward, adapters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.adapters:
            return self.forward(self.host, *args, **kwargs)
        *remaining, outermost = self.adapters
        return outermost(self.host, InnerCall(self.host, self.forward, remaining), *args, **kwargs)

    def on(self, host: Any) -> InnerCall:
        """Return the same call of another host, such as a view of the host that reads other weights."""
        return InnerCall(host, self.forward, self.adapters)

    def without_outermost(self) -> InnerCall:
        """Return the call without the outermost of the remaining adapters."""
        return InnerCall(self.host, self.forward, self.adapters[:-1])


def parameter_like(weight: Tensor, *shape: int) -> nn.Parameter:
    """Return an uninitialized parameter on the device of a host's weight, in its type but never below float32.

    Examples:
        >>> from lightning_peft.core import parameter_like
        >>> parameter_like(torch.zeros(2, 2, dtype=torch.bfloat16), 3).dtype
        torch.float32
    """
    check_allocation(shape)
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
    return nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values: on the meta device, and while memory is planned, it has a shape alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
