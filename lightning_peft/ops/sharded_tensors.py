"""Tensors of which each process holds a part (DTensors, FSDP1's parameters): to read and write; who writes files."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .fsdp1_parameters import shard_of


def writes_files() -> bool:
    """Whether this process is the one that writes files: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its values; of a sharded one, all processes have to ask for it."""
    if (part := shard_of(tensor)) is not None:
        return part.gather(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def global_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole."""
    part = shard_of(tensor)
    return tensor.shape if part is None else part.shape


def local_shard(target: Tensor, values: Tensor) -> Tensor:
    """Return values of the whole as a tensor is sharded; each process takes its own part, and none sends anything."""
    if (part := shard_of(target)) is not None:
        return part.cut(values)
    if not isinstance(target, DTensor):
        return values
    own = values.to(target.device_mesh.device_type)
    return distribute_tensor(own, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def assign(target: Tensor, values: Tensor) -> None:
    """Copy values of the whole into a tensor, sharded or not."""
    target.copy_(local_shard(target, values))


def sample_values(tensor: Tensor, count: int) -> Tensor:
    """Return up to ``count`` values of the whole, evenly spread, in the order of its elements."""
    size = global_shape(tensor).numel()
    positions = torch.arange(0, size, max(1, size // count))[:count]
    if (part := shard_of(tensor)) is not None:
        inside = (positions >= part.start) & (positions < part.start + tensor.numel())
        found = torch.zeros(len(positions), dtype=tensor.dtype, device=tensor.device)
        found[inside.to(tensor.device)] = tensor.detach()[(positions[inside] - part.start).to(tensor.device)]
        dist.all_reduce(found, group=part.group)
        return found
    if not isinstance(tensor, DTensor):
        return tensor.detach().reshape(-1)[:: max(1, size // count)][:count]
    local, place = tensor.to_local().detach(), tensor.device_mesh
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, place, tensor.placements)
    found = torch.zeros(len(positions), dtype=local.dtype, device=local.device)
    coordinates = zip(place.get_coordinate() or [], tensor.placements, strict=True)
    if all(c == 0 for c, kind in coordinates if kind == Replicate()):  # of equal copies, one counts
        indices = [i - start for i, start in zip(torch.unravel_index(positions, tensor.shape), offset, strict=True)]
        inside = torch.stack([(i >= 0) & (i < n) for i, n in zip(indices, shape, strict=True)]).all(0)
        found[inside.to(local.device)] = local[tuple(i[inside].to(local.device) for i in indices)]
    for dimension in range(place.ndim):
        dist.all_reduce(found, group=place.get_group(dimension))
    return found
