"""``OwnParameters`` trains copies of base parameters, such as the heads of several tasks that share one base."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.base_model import count_owners, own_tensors, stored_parameter
from ..structure.selection import select_parameters
from .active_on_host import active_alone, active_keys
from .adapter import Adapter, Call, parameter_like
from .method import Method
from .per_row import BatchableLayerAdapter

COPIES_ATTRIBUTE = "own"  # child of an adapter that holds the copies; adapter files contain the name


@dataclass(frozen=True, kw_only=True)
class OwnParameters(Method):
    """Trains copies of parameters, which whoever reads the base's gets while they are active: y = host(x; copies).

    ``also_train`` trains the base itself; here the base stays as it is, so that several tasks can each have a head side
    by side, and ``disabled`` gives the base. Copies start from the base's values.

    Args:
        name: Name of the adapters.
        targets: Globs of modules or parameters, or roles.
    """

    name: str = "own"
    targets: list[str]

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        by_host, owners = defaultdict[str, list[str]](list), count_owners(model)
        for name in select_parameters(model, self.targets):
            owner, _, key = name.rpartition(".")
            if owners[id(stored_parameter(model, name))] > 1:
                raise ValueError(f"{name} is shared with another module, which would go on without the copy; untie it.")
            by_host[owner].append(key)
        for owner, keys in by_host.items():
            yield owner, OwnTensors(model.get_submodule(owner), keys)


class OwnTensors(BatchableLayerAdapter, Adapter):
    """Stands for parameters of its host, and for its buffers (statistics of a norm), wherever they are read.

    The host's own are never touched: its class has properties that return the copies while this adapter is active, in
    the types of those that they replace.

    Args:
        host: Module that holds the parameters itself.
        names: Names of these parameters.
    """

    needs_separate_call = True

    def __init__(self, host: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.replaces, self.own = tuple(names), nn.Module()
        for name in names:
            base = stored_parameter(host, name)
            self.own.register_parameter(name, parameter_like(base, *base.shape))
        for name, buffer in host.named_buffers(recurse=False):
            if name not in host._non_persistent_buffers_set:
                self.own.register_buffer(name, torch.empty_like(buffer))
        self.replaced_tensors = tuple(name for name, _ in self._values())
        self.reset_parameters(host)

    @torch.no_grad()
    def reset_parameters(self, host: Any = None) -> None:
        """Start from the host's values."""
        if any(value.is_meta for _, value in self._values()):
            return  # loading fills them, or this is called again once they have storage
        if host is None:
            raise TypeError(
                "Copies of parameters start from those of the base: load the base model first, then inject."
            )
        for name, value in self._values():
            value.copy_(own_tensors(host)[name])

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        return itertools.chain(self.own.named_parameters(), self.own.named_buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OwnTensors:
        super()._apply(fn, recurse)
        for name, buffer in self.own.named_buffers():  # in the type of the host's: forward changes them in place
            self.own._buffers[name] = fn(buffer)
        return self

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        if any(host._modules["peft"]._modules[key] is self for key in active_keys(host)):
            return inner(*args, **kwargs)
        with active_alone(host, self):  # for the rows of a batch that have these parameters
            return inner(*args, **kwargs)

    def replacement(self, name: str, stored: Tensor) -> Tensor:
        parameter = self.own._parameters.get(name)
        return self.own._buffers[name] if parameter is None else parameter.to(stored.dtype)  # type: ignore[return-value]

    def assign_replacement(self, name: str, value: Tensor) -> None:
        self.own._buffers[name] = value

    @torch.no_grad()
    def merge(self, host: Any) -> None:
        for name, value in self._values():
            own_tensors(host)[name].copy_(value)
