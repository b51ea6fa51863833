"""``OwnParameters`` trains copies of base parameters, such as the heads of several tasks that share one base."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.base_model import own_tensors, stored_parameter
from ..structure.quantized import is_quantized
from ..structure.selection import names_of_shared, select_parameter_names
from .active_on_host import active_alone, active_keys
from .adapter import Adapter, Call, parameter_like
from .method import Method
from .per_row import BatchableLayerAdapter

COPIES_ATTRIBUTE = "own"  # child of an adapter that holds the copies; adapter files contain the name


@dataclass(frozen=True, kw_only=True)
class OwnParameters(Method):
    """Trains copies of parameters, which whoever reads the base's gets while they are active: y = host(x; copies).

    ``also_train`` trains the base itself; here the base stays as it is, so that several tasks can each have a head side
    by side, and ``disabled`` gives the base. Copies start from the base's values. Modules that share a parameter share
    its copy if targets name all of them.

    Args:
        name: Name of the adapters.
        targets: Globs of modules or parameters, or roles.
        untie: Whether a module that is named alone, and each that is named, gets a copy of a shared parameter for
            itself; the others go on with the base's.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = lp.inject(model, lp.OwnParameters(targets=["2"]))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['2.peft.own.own.weight', '2.peft.own.own.bias']
    """

    name: str = "own"
    targets: list[str]
    untie: bool = False

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        by_host, named = defaultdict[str, list[str]](list), Counter[str]()
        first_names = names_of_shared(model)
        for name in select_parameter_names(model, self.targets):
            host, _, key = name.rpartition(".")
            by_host[host].append(key)
            named[first_names[name]] += 1
        owners = Counter(first_names.values())
        if partly := [name for name, count in named.items() if count < owners[name] and not self.untie]:
            others = [name for name, first_name in first_names.items() if first_name == partly[0]]
            raise ValueError(
                f"{partly[0]} is shared with another module, which would go on without the copy: name "
                f"{' and '.join(others)}, or set untie=True for a copy of what is named alone."
            )
        copies: dict[str, nn.Parameter] | None = None if self.untie else {}
        for host, keys in by_host.items():
            shared_names = {key: first_names[f"{host}.{key}".lstrip(".")] for key in keys}
            yield host, OwnTensors(model.get_submodule(host), shared_names, copies)


class OwnTensors(BatchableLayerAdapter, Adapter):
    """Stands for parameters of its host, and for its buffers (statistics of a norm), wherever they are read.

    The host's own are never touched: its class has properties that return the copies while this adapter is active, in
    the types of those that they replace.

    Args:
        host: Module that holds the parameters itself.
        names: Names of these parameters, with the name that each has in the model.
        copies: Copies by that name, which modules share that share a parameter; it is added to. None to share nothing.
    """

    needs_separate_call = True

    def __init__(self, host: nn.Module, names: Mapping[str, str], copies: dict[str, nn.Parameter] | None) -> None:
        super().__init__()
        self.replaces, self.own = tuple(names), nn.Module()
        for name, first_name in names.items():
            base = stored_parameter(host, name)
            copied = None if copies is None else copies.get(first_name)
            self.own.register_parameter(name, parameter_like(base, *base.shape) if copied is None else copied)
            if copies is not None:
                copies[first_name] = self.own.get_parameter(name)
        for name, buffer in host.named_buffers(recurse=False):
            if name not in host._non_persistent_buffers_set and not is_quantized(host):  # whose statistics are of codes
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
