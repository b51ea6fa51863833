"""``full_tensor``, ``local_shard``, ``assign``...: reading and writing tensors of which each process holds a part."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from .torch_api import is_plain, local_part

_SHARD = "_peft_shard"


class Shard(Protocol):
    """Description of the part of a full tensor that a process holds, for plain tensors that are no ``DTensor``.

    A strategy that replaces parameters by parts of them sets a shard on each such parameter, by ``set_shard``.
    """

    @property
    def global_shape(self) -> torch.Size:
        """Shape of the full tensor."""

    def full(self, local_values: Tensor) -> Tensor:
        """Return the full tensor; all processes have to call it with their local values."""

    def local(self, values: Tensor) -> Tensor:
        """Return this process's part of the full values."""

    def sample(self, local_values: Tensor, positions: Tensor) -> Tensor:
        """Return the elements of the full tensor at these positions; all processes have to call it."""


def set_shard(tensor: Tensor, shard: Shard) -> None:
    """Attach a shard to a tensor; results of operations on the tensor do not inherit it."""
    setattr(tensor, _SHARD, shard)


def shard_of(tensor: Tensor) -> Shard | None:
    """Return the shard that ``set_shard`` has attached to a tensor, or None."""
    return getattr(tensor, _SHARD, None)


def writes_files() -> bool:
    """Return whether this process writes files: the first one does, and a single one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_sharded(tensor: Tensor | None) -> bool:
    """Return whether a tensor is a ``DTensor`` of which each process holds a part, as FSDP2 stores between calls."""
    return isinstance(tensor, DTensor) and not all(placement.is_replicate() for placement in tensor.placements)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its values; for a sharded one, all processes have to call it."""
    if (shard := shard_of(tensor)) is not None:
        return shard.full(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def global_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the full tensor."""
    shard = shard_of(tensor)
    return tensor.shape if shard is None else shard.global_shape


def local_shard(target: Tensor, values: Tensor) -> Tensor:
    """Return the part of full ``values`` that belongs to ``target`` on this process, without communication."""
    if (shard := shard_of(target)) is not None:
        return shard.local(values)
    if not isinstance(target, DTensor):
        return values
    moved = values.to(target.device_mesh.device_type)
    return distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def assign(target: Tensor, values: Tensor) -> None:
    """Copy full values into a tensor, sharded or not."""
    target.copy_(local_shard(target, values))


def sample_values(tensor: Tensor, count: int) -> Tensor:
    """Return up to ``count`` values of the full tensor, evenly spread, in the order of its elements."""
    size = global_shape(tensor).numel()
    step = max(1, size // count)
    if (shard := shard_of(tensor)) is not None:
        return shard.sample(tensor, torch.arange(0, size, step)[:count])
    if not isinstance(tensor, DTensor):
        if is_plain(tensor) and tensor.is_contiguous():  # one operator instead of three
            return tensor.detach().as_strided((min(count, -(-size // step)),), (step,))
        return tensor.detach().reshape(-1)[::step][:count]
    return _sample_dtensor(tensor, torch.arange(0, size, step)[:count])


def _sample_dtensor(tensor: DTensor, positions: Tensor) -> Tensor:
    """Return the elements at these positions: each process contributes those that it holds."""
    local, mesh = tensor.to_local().detach(), tensor.device_mesh
    shape, offset = local_part(tensor)
    values = torch.zeros(len(positions), dtype=local.dtype, device=local.device)
    coordinates = zip(mesh.get_coordinate() or [], tensor.placements, strict=True)
    if all(c == 0 for c, placement in coordinates if placement == Replicate()):  # one of several replicas counts
        indices = [i - start for i, start in zip(torch.unravel_index(positions, tensor.shape), offset, strict=True)]
        inside = torch.stack([(i >= 0) & (i < n) for i, n in zip(indices, shape, strict=True)]).all(0)
        values[inside.to(local.device)] = local[tuple(i[inside].to(local.device) for i in indices)]
    for dimension in range(mesh.ndim):
        dist.all_reduce(values, group=mesh.get_group(dimension))
    return values
