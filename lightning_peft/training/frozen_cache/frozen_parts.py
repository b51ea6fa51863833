"""``Trunk``: the largest frozen modules of a model, with probes that let a step run, record or skip them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from ...core.adapted_module import AdaptedModule, attach, can_hold_adapters, remove
from ...core.adapter import Adapter, Call
from ...ops.torch_api import hooks, is_compiled_in_place, write_count
from ...structure.base_model import holds_adapters
from .use_tracing import mark_used

KEY = "_frozen_trunk"  # of its adapters on their hosts


class Step(Protocol):
    """One training or validation step, as the probes see it."""

    past_trunk: bool  # whether something that trains has started

    def call(self, name: str, inner: Call, args: Any, kwargs: Any) -> Any:
        """Return what a part of the trunk returns."""

    def end_trunk(self, name: str) -> None:
        """Note that ``name``, which trains, is called."""

    def run_late(self, name: str) -> None:
        """Note that a frozen part was called after that."""


class Probe(Adapter):
    """Adapter that surrounds the calls of one module; it is not saved, and does nothing in copies of the model.

    Args:
        name: Name of the host.
        trunk: The trunk that the step is asked from.
    """

    persistent = False

    def __init__(self, name: str, trunk: Trunk) -> None:
        super().__init__()
        self.name = name
        self.trunk: Trunk | None = trunk

    def reset_parameters(self) -> None:
        """There are none."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trunk": None}


class FrozenProbe(Probe):
    """Lets the step decide whether a frozen module runs."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        step = None if self.trunk is None else self.trunk.step
        if step is not None and not step.past_trunk:
            return step.call(self.name, inner, args, kwargs)
        if step is not None:
            step.run_late(self.name)
            args, kwargs = mark_used((args, kwargs))
        return inner(*args, **kwargs)


class TrainedProbe(Probe):
    """Ends the trunk of a step where a module that trains is called."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        if self.trunk is not None and self.trunk.step is not None:
            self.trunk.step.end_trunk(self.name)
            args, kwargs = mark_used((args, kwargs))
        return inner(*args, **kwargs)


class Trunk:
    """The largest frozen parts of a model, and the steps that they run in.

    Args:
        model: Model that is ready to train.

    Raises:
        ValueError: All of it trains.
        TypeError: A part is compiled, scripted or sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.step: Step | None = None
        self.frozen, self.trained = find_parts(model)
        if not self.frozen:
            raise ValueError("cache_frozen=True has nothing to cache: each module of the model trains.")
        for name, module in model.named_modules():
            _check_kind(name or "The model", module)
        for name, module in (self.frozen | self.trained).items():
            _check_part(name, module)

    def attach(self) -> None:
        """Attach the probes."""
        for probe, hosts in ((FrozenProbe, self.frozen), (TrainedProbe, self.trained)):
            for name, host in hosts.items():
                attach(host, KEY, probe(name, self))

    def remove(self) -> None:
        """Remove the probes."""
        for host in (self.frozen | self.trained).values():
            if isinstance(host, AdaptedModule) and KEY in host.peft:
                remove(host, KEY)

    @contextlib.contextmanager
    def buffers_stay(self, name: str) -> Iterator[None]:
        """Context in which no buffer of the model may change."""
        before = {key: (buffer, write_count(buffer)) for key, buffer in self.model.named_buffers()}
        yield
        changed = [key for key, (buffer, version) in before.items() if write_count(buffer) != version]
        if changed:
            raise ValueError(
                f"cache_frozen=True needs a trunk that changes nothing, but {changed[0]} had changed when {name} "
                f"returned. Put batch norm there into evaluation mode, or set cache_frozen=False."
            )

    def check_frozen(self) -> None:
        """Raise if a part trains that did not in the beginning."""
        for name, host in self.frozen.items():
            if any(p.requires_grad for p in host.parameters()):
                raise ValueError(f"{name} was frozen when fit started and trains now; set cache_frozen=False.")

    def check_hooks(self, names: list[str]) -> None:
        """Raise if hooks inside these parts would not be called, as those that collect hidden states."""
        for name in names:
            for inner, module in self.frozen[name].named_modules():
                if inner and hooks(module, "forward"):
                    raise ValueError(
                        f"{name}.{inner} has a forward hook, which is not called where cache_frozen=True skips {name}. "
                        f"Hook {name} itself, ask for no hidden states or attentions, or set cache_frozen=False."
                    )

    def only_looks_up(self, names: list[str]) -> bool:
        """Return whether these parts hold embeddings and norms alone, which cost less than what is read back."""
        modules = [module for name in names for module in self.frozen[name].modules()]
        others = [m for m in modules if not isinstance(m, nn.Embedding)]
        return not any(p.dim() > 1 for m in others for p in m._parameters.values() if p is not None)


def find_parts(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the largest called modules in which nothing trains, and those in which all, or an adapter, trains."""
    frozen, trained, seen = dict[str, nn.Module](), dict[str, nn.Module](), set[int]()

    def walk(module: nn.Module, prefix: str) -> None:
        for key, child in module.named_children():
            flags, free = [p.requires_grad for p in child.parameters()], can_hold_adapters(child)  # where probes are
            if not flags or holds_adapters(module, key) or id(child) in seen:
                continue
            seen.add(id(child))
            if not free and any(flags) and _trains_itself(child):
                raise ValueError(
                    f"{prefix}{key} trains and has an attribute 'peft' of its own, where cache_frozen=True would watch "
                    f"it; set cache_frozen=False."
                )
            if not free or not _is_called(child) or (any(flags) and not (all(flags) or _trains_itself(child))):
                walk(child, f"{prefix}{key}.")
            else:
                (trained if any(flags) else frozen)[prefix + key] = child

    walk(model, "")
    return frozen, trained


def _is_called(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is not nn.Module.forward


def _trains_itself(module: nn.Module) -> bool:
    direct: Mapping[str, Tensor | None] = module._parameters
    adapters = module.peft.parameters() if isinstance(module, AdaptedModule) else ()
    return any(p is not None and p.requires_grad for p in (*direct.values(), *adapters))


def _check_kind(name: str, module: nn.Module) -> None:
    """Raise if a module is of a kind that nothing can be cut out of."""
    kinds = (FSDPModule, FullyShardedDataParallel)
    if isinstance(module, kinds) or any(isinstance(p, DTensor) for p in module._parameters.values()):
        raise TypeError(f"{name} is sharded, and cache_frozen=True works on whole models; set cache_frozen=False.")
    if "_orig_mod" in module._modules or is_compiled_in_place(module):
        raise TypeError(f"{name} is compiled, and cache_frozen=True cuts it out; compile nothing, or do not cache.")


def _check_part(name: str, module: nn.Module) -> None:
    """Raise if calls of a part cannot be surrounded."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        raise TypeError(f"{name} is scripted, or its forward was replaced on the instance: its calls cannot be cached.")
