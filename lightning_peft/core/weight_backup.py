"""``WeightBackup``: backup of weights that ``merge(keep=True)`` changed, so that ``unmerge`` is exact to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..ops.torch_api import remove_hooks
from ..structure.base_model import own_tensors

_BACKUP = "_peft_overwritten"
# Types to compare values by their bits, by size of an element: -0.0 == 0.0, and nan equals nothing.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class ChangedSlices:
    """Values of a tensor at some indices along one dimension."""

    dimension: int
    indices: Tensor
    values: Tensor

    def copy_into(self, tensor: Tensor) -> None:
        """Write the values at their indices."""
        local = _at_least_1d(_local(tensor))
        local.index_copy_(self.dimension, self.indices.to(local.device), self.values.to(local.device))


@dataclass
class WeightBackup:
    """Data that undoes a change of a host.

    Args:
        order: Keys of the adapters that were merged.
        names: Names of all parameters that the host had.
        replaced: Parameters and buffers in whose place the host has another now; None for a name without a tensor.
        slices: Former values of parameters and buffers that were written to, where the bits differ.
    """

    order: tuple[str, ...]
    names: list[str]
    replaced: dict[str, Tensor | None]
    slices: dict[str, ChangedSlices]

    def tensors(self, host: Any) -> dict[str, Tensor]:
        """Return the parameters and buffers of the host that were written to, and those that were replaced."""
        tensors = own_tensors(host) | self.replaced
        return {name: tensor for name in (*self.slices, *self.replaced) if (tensor := tensors[name]) is not None}


@torch.no_grad()
def run_with_backup(host: Any, by: Callable[[], None], order: tuple[str, ...]) -> WeightBackup:
    """Run ``by``, which changes a host's tensors, and keep the backup on the host, even if ``by`` fails halfway."""
    names, before = list(host._parameters), own_tensors(host)
    copies = {name: _local(tensor).clone() for name, tensor in before.items() if tensor is not None}
    try:
        by()
    finally:
        now = own_tensors(host)
        differing = {name: _differing(copy, _local(before[name])) for name, copy in copies.items()}
        replaced = {name: tensor for name, tensor in before.items() if now.get(name) is not tensor}
        slices = {name: changed for name, changed in differing.items() if changed is not None}
        backup = vars(host)[_BACKUP] = WeightBackup(order, names, replaced, slices)
    for name, p in host._parameters.items():
        if p is not None and before.get(name) is not p:
            p.requires_grad_(False)
    host.register_state_dict_post_hook(_show_base)
    return backup


@torch.no_grad()
def restore(host: Any) -> WeightBackup:
    """Restore the tensors of a host from the backup of ``run_with_backup``, which is removed and returned."""
    backup: WeightBackup = vars(host).pop(_BACKUP)
    remove_hooks(host, "state_dict", _show_base)
    for name in host._parameters.keys() - set(backup.names):
        del host._parameters[name]
    for name, tensor in backup.replaced.items():
        (host._parameters if name in backup.names else host._buffers)[name] = tensor
    for name, slices in backup.slices.items():
        slices.copy_into(own_tensors(host)[name])
    return backup


def changed_hosts(model: nn.Module) -> list[tuple[str, Any, WeightBackup]]:
    """Return (name, host, backup) of the hosts whose weights hold merged adapters."""
    return [(name, module, vars(module)[_BACKUP]) for name, module in model.named_modules() if _BACKUP in vars(module)]


def check_not_merged(model: nn.Module) -> None:
    """Raise where adapters are merged into a model's weights."""
    if any(_BACKUP in vars(module) for module in model.modules()):
        raise RuntimeError("Adapters are merged into this model's weights; call unmerge(model) first.")


def forbid_loading(model: nn.Module) -> None:
    """Let ``load_state_dict`` of changed hosts, and of modules around them, raise until ``allow_loading`` is called."""
    for module in model.modules():
        if changed_hosts(module):
            module.register_load_state_dict_pre_hook(_raise_on_load)  # type: ignore[no-untyped-call]


def allow_loading(model: nn.Module) -> None:
    """Undo ``forbid_loading``."""
    for module in model.modules():
        remove_hooks(module, "load_state_dict_pre", _raise_on_load)


def _raise_on_load(module: nn.Module, *args: Any) -> None:
    check_not_merged(module)


def _differing(old: Tensor, new: Tensor) -> ChangedSlices | None:
    """Return the slices of ``old`` whose bits differ in ``new``, along the dimension with the fewest such slices."""
    bits = _BITS[old.element_size()]
    differs = _at_least_1d(old.view(bits) != new.view(bits))
    if not differs.any():
        return None
    along = [differs.movedim(d, 0).reshape(size, -1).any(1) for d, size in enumerate(differs.shape)]
    dimension = min(range(len(along)), key=lambda d: along[d].float().mean().item())
    indices = along[dimension].nonzero()[:, 0]
    return ChangedSlices(dimension, indices, _at_least_1d(old).index_select(dimension, indices))


def _at_least_1d(tensor: Tensor) -> Tensor:
    """Return a view with at least one dimension."""
    return tensor.view(tensor.shape or (1,))


def _local(tensor: Tensor) -> Tensor:
    """Return the values that this process holds, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _show_base(host: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Put the unmerged values of the base into a state dict, since it holds the adapters as well."""
    backup: WeightBackup = vars(host)[_BACKUP]
    for name in host._parameters.keys() - set(backup.names) | backup.replaced.keys():
        state.pop(prefix + name, None)
    state |= {prefix + name: tensor.detach() for name, tensor in backup.replaced.items() if tensor is not None}
    for name in backup.slices.keys() & {key.removeprefix(prefix) for key in state}:
        state[prefix + name] = state[prefix + name].detach().clone()
        backup.slices[name].copy_into(state[prefix + name])
