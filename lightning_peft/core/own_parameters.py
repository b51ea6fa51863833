"""``OwnParameters`` trains copies of base parameters, such as the heads of several tasks that share one base."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.base_model import count_owners, own_tensors
from ..structure.selection import select_parameters
from .adapter import Adapter, Call, parameter_like
from .method import Method
from .per_row import BatchableLayerAdapter

COPIES_ATTRIBUTE = "own"  # child of an adapter that holds the copies; adapter files contain the name


@dataclass(frozen=True, kw_only=True)
class OwnParameters(Method):
    """Trains copies of parameters, which replace the base's while the host is called: y = host(x; copies).

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
            if owners[id(model.get_parameter(name))] > 1:
                raise ValueError(f"{name} is shared with another module, which would go on without the copy; untie it.")
            by_host[owner].append(key)
        for owner, keys in by_host.items():
            yield owner, OwnTensors(model.get_submodule(owner), keys)


class OwnTensors(BatchableLayerAdapter, Adapter):
    """Replaces parameters of its host, and its buffers (statistics of a norm), during each call.

    Args:
        host: Module that holds the parameters itself.
        names: Names of these parameters.
    """

    needs_separate_call = True

    def __init__(self, host: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.replaces, self.own = tuple(names), nn.Module()
        for name in names:
            base = host.get_parameter(name)
            self.own.register_parameter(name, parameter_like(base, *base.shape))
        for name, buffer in host.named_buffers(recurse=False):
            if name not in host._non_persistent_buffers_set:
                self.own.register_buffer(name, torch.empty_like(buffer))
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

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        with self.swapped_in(host):
            return inner(*args, **kwargs)

    @contextmanager
    def swapped_in(self, host: Any) -> Iterator[None]:
        """Context in which the host holds the copies, cast to its types; buffers that change are copied back."""
        parameters, buffers, before = dict(host._parameters), dict(host._buffers), own_tensors(host)
        cast = {name: value.to(before[name].dtype) for name, value in self._values()}
        host._parameters.update({name: cast[name] for name in self.own._parameters})
        host._buffers.update({name: cast[name] for name in self.own._buffers})
        try:
            yield
        finally:
            host._parameters.update(parameters)
            host._buffers.update(buffers)
            for name, buffer in self.own.named_buffers():
                if buffer is not cast[name]:
                    buffer.copy_(cast[name])

    @torch.no_grad()
    def merge(self, host: Any) -> None:
        for name, value in self._values():
            own_tensors(host)[name].copy_(value)
