"""What merging overwrote in a host's parameters and buffers: kept there, so that it comes back to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..structure.base_model import own_tensors

_KEPT = "_peft_overwritten"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # to compare by: -0.0 equals 0.0, nan nothing


@dataclass
class ChangedSlices:
    """Values of a tensor at some places along one dimension."""

    dimension: int
    places: Tensor
    values: Tensor

    def copy_into(self, tensor: Tensor) -> None:
        """Write the values where they were."""
        own = _with_sides(_local(tensor))
        own.index_copy_(self.dimension, self.places.to(own.device), self.values.to(own.device))


@dataclass
class WeightBackup:
    """What is needed to undo a change of a host.

    Args:
        order: Names of the adapters that took part.
        names: All names of parameters that the host had.
        replaced: Parameters and buffers that are others now, or None where there was none.
        slices: Values of those that were written to, where they differ.
    """

    order: tuple[str, ...]
    names: list[str]
    replaced: dict[str, Tensor | None]
    slices: dict[str, ChangedSlices]

    def tensors(self, host: Any) -> dict[str, Tensor]:
        """Return the parameters and buffers that the host had before, as far as they were written to or replaced."""
        own = own_tensors(host) | self.replaced
        return {name: tensor for name in (*self.slices, *self.replaced) if (tensor := own[name]) is not None}


@torch.no_grad()
def run_with_backup(host: Any, by: Callable[[], None], order: tuple[str, ...]) -> WeightBackup:
    """Change a host's tensors and keep in it what that overwrites, also where the change fails on its way."""
    names, before = list(host._parameters), own_tensors(host)
    copies = {name: _local(tensor).clone() for name, tensor in before.items() if tensor is not None}
    try:
        by()
    finally:
        now = own_tensors(host)
        differing = {name: _differing(copy, _local(before[name])) for name, copy in copies.items()}
        replaced = {name: tensor for name, tensor in before.items() if now.get(name) is not tensor}
        slices = {name: found for name, found in differing.items() if found is not None}
        kept = vars(host)[_KEPT] = WeightBackup(order, names, replaced, slices)
    for name, p in host._parameters.items():
        if p is not None and before.get(name) is not p:
            p.requires_grad_(False)
    host.register_state_dict_post_hook(_show_base)
    return kept


@torch.no_grad()
def restore(host: Any) -> WeightBackup:
    """Give a host back what ``run_with_backup`` kept."""
    kept: WeightBackup = vars(host).pop(_KEPT)
    for number, hook in list(host._state_dict_hooks.items()):
        if hook is _show_base:
            del host._state_dict_hooks[number]
    for name in host._parameters.keys() - set(kept.names):
        del host._parameters[name]
    for name, tensor in kept.replaced.items():
        (host._parameters if name in kept.names else host._buffers)[name] = tensor
    for name, slices in kept.slices.items():
        slices.copy_into(own_tensors(host)[name])
    return kept


def changed_hosts(model: nn.Module) -> list[tuple[str, Any, WeightBackup]]:
    """Return the hosts of which something is kept: (name, host, what)."""
    return [(name, module, vars(module)[_KEPT]) for name, module in model.named_modules() if _KEPT in vars(module)]


def check_not_merged(model: nn.Module) -> None:
    """Raise where adapters are merged into a model's weights."""
    if any(_KEPT in vars(module) for module in model.modules()):
        raise RuntimeError("Adapters are merged into this model's weights for now; call unmerge(model) first.")


def forbid_loading(model: nn.Module) -> None:
    """Let ``load_state_dict`` of whatever holds a changed host raise, until ``allow_loading``."""
    for module in model.modules():
        if changed_hosts(module):
            module.register_load_state_dict_pre_hook(_raise_on_load)  # type: ignore[no-untyped-call]


def allow_loading(model: nn.Module) -> None:
    """Undo ``forbid_loading``."""
    for module in model.modules():
        hooks: Any = module._load_state_dict_pre_hooks
        for number in [number for number, wrapped in hooks.items() if wrapped.hook is _raise_on_load]:
            del hooks[number]


def _raise_on_load(module: nn.Module, *args: Any) -> None:
    check_not_merged(module)


def _differing(old: Tensor, new: Tensor) -> ChangedSlices | None:
    """Return what of ``old`` has other bits in ``new``, along the dimension in which the fewest places differ."""
    bits = _BITS[old.element_size()]
    differs = _with_sides(old.view(bits) != new.view(bits))
    if not differs.any():
        return None
    along = [differs.movedim(d, 0).reshape(size, -1).any(1) for d, size in enumerate(differs.shape)]
    dimension = min(range(len(along)), key=lambda d: along[d].float().mean().item())
    where = along[dimension].nonzero()[:, 0]
    return ChangedSlices(dimension, where, _with_sides(old).index_select(dimension, where))


def _with_sides(tensor: Tensor) -> Tensor:
    """Return a view with at least one dimension."""
    return tensor.view(tensor.shape or (1,))


def _local(tensor: Tensor) -> Tensor:
    """Return the values that this process holds, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _show_base(host: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Let state dicts hold the base as it is without adapters, which are in there as well."""
    kept: WeightBackup = vars(host)[_KEPT]
    for name in host._parameters.keys() - set(kept.names) | kept.replaced.keys():
        state.pop(prefix + name, None)
    state |= {prefix + name: tensor.detach() for name, tensor in kept.replaced.items() if tensor is not None}
    for name in kept.slices.keys() & {key.removeprefix(prefix) for key in state}:
        state[prefix + name] = state[prefix + name].detach().clone()
        kept.slices[name].copy_into(state[prefix + name])
