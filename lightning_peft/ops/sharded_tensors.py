"""``full_tensor``, ``local_shard``, ``assign``...: reading and writing sharded tensors (DTensors and FSDP1's)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .fsdp1_parameters import shard_of


def writes_files() -> bool:
    """Return whether this process writes files: the first one does, and a single one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its values; all processes that hold a shard have to call it."""
    if (flat_shard := shard_of(tensor)) is not None:
        return flat_shard.gather(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def global_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the full tensor."""
    flat_shard = shard_of(tensor)
    return tensor.shape if flat_shard is None else flat_shard.shape


def local_shard(target: Tensor, values: Tensor) -> Tensor:
    """Return the shard of full ``values`` that belongs to ``target`` on this process, without communication."""
    if (flat_shard := shard_of(target)) is not None:
        return flat_shard.cut(values)
    if not isinstance(target, DTensor):
        return values
    on_device = values.to(target.device_mesh.device_type)
    return distribute_tensor(on_device, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def assign(target: Tensor, values: Tensor) -> None:
    """Copy full values into a tensor, sharded or not."""
    target.copy_(local_shard(target, values))


def sample_values(tensor: Tensor, count: int) -> Tensor:
    """Return up to ``count`` values of the full tensor, evenly spread, in the order of its elements."""
    size = global_shape(tensor).numel()
    positions = torch.arange(0, size, max(1, size // count))[:count]
    if (flat_shard := shard_of(tensor)) is not None:
        start = flat_shard.start
        inside = (positions >= start) & (positions < start + tensor.numel())
        values = torch.zeros(len(positions), dtype=tensor.dtype, device=tensor.device)
        values[inside.to(tensor.device)] = tensor.detach()[(positions[inside] - start).to(tensor.device)]
        dist.all_reduce(values, group=flat_shard.group)
        return values
    if not isinstance(tensor, DTensor):
        return tensor.detach().reshape(-1)[:: max(1, size // count)][:count]
    local, mesh = tensor.to_local().detach(), tensor.device_mesh
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    values = torch.zeros(len(positions), dtype=local.dtype, device=local.device)
    coordinates = zip(mesh.get_coordinate() or [], tensor.placements, strict=True)
    if all(c == 0 for c, placement in coordinates if placement == Replicate()):  # only one of several replicas counts
        indices = [i - start for i, start in zip(torch.unravel_index(positions, tensor.shape), offset, strict=True)]
        inside = torch.stack([(i >= 0) & (i < n) for i, n in zip(indices, shape, strict=True)]).all(0)
        values[inside.to(local.device)] = local[tuple(i[inside].to(local.device) for i in indices)]
    for dimension in range(mesh.ndim):
        dist.all_reduce(values, group=mesh.get_group(dimension))
    return values
