"""Adapters in a model that tensor parallelism has split: their tensors are split along with their host's weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from ..structure.layer_types import is_called_linear
from .adapted_module import adapters
from .adapter import Adapter

_SIDES = {0: "out", 1: "in"}  # of the host's weight, by the dimension that is split


def is_split(host: nn.Module) -> bool:
    """Whether tensor parallelism has split a layer: its weight and, by hooks, what goes in and comes out."""
    held: Any = host._parameters  # of a scripted module no dict
    sharded = "weight" in held and isinstance(held["weight"], DTensor)
    return sharded and bool(host._forward_pre_hooks) and not isinstance(host, FSDPModule)


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """Return the processes that tensor parallelism has split a model's layers over; None if it has not."""
    hosts: Iterable[Any] = model.modules()
    return next((host.weight.device_mesh for host in hosts if is_split(host)), None)


def split_side(host: nn.Module) -> str | None:
    """Return along which side of its weight a host is split: ``out`` (column-wise), ``in`` (row-wise) or neither."""
    weight: Any = host._parameters["weight"]
    place = weight.placements[0]
    known = len(weight.placements) == 1 and isinstance(place, Shard) and is_called_linear(host)
    return _SIDES.get(place.dim) if known else None


def check_tensor_parallel_support(host: nn.Module, name: str, key: str, adapter: Adapter) -> None:
    """Raise a ``TypeError`` if an adapter would not compute the same in a model that tensor parallelism has split."""
    what = f"{type(adapter).__name__} {key!r} at {name or 'the root'}"
    if adapter.tensor_parallel_dims is None:
        raise TypeError(
            f"{what} does not run under tensor parallelism, where each process has a part of the heads and features. "
            f"LoRA, IA3 and others do; FSDP2 and DDP run every method."
        )
    if any(getattr(part, "dropout", 0) for part in adapter.modules()):
        raise TypeError(f"{what} has dropout, which each process would draw for itself; set it to 0.")
    if is_split(host) and (adapter.part or split_side(host) is None):
        raise TypeError(f"{what} follows linear layers, whole, that are split column-wise or row-wise over one mesh.")


def shard_adapters(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the adapters of split hosts along with them; give all processes the same values of what else trains.

    What runs along the split side of the host is split, all else of such an adapter is a tensor that each process
    holds whole. Calling it again changes nothing.
    """
    for _, host, _, adapter in adapters(model):
        if is_split(host):
            _split(adapter, split_side(host), mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    own = [tensor for *_, adapter in adapters(model) for tensor in (*adapter.parameters(), *adapter.buffers())]
    broadcast_values((*trained, *own), mesh)


def _split(adapter: Adapter, side: str | None, mesh: DeviceMesh) -> None:
    for name, own in [*adapter.named_parameters(), *adapter.named_buffers()]:
        if isinstance(own, DTensor):
            continue
        axes = (adapter.tensor_parallel_dims or {}).get(name, ())
        place: Placement = Shard(axes.index(side)) if side in axes else Replicate()
        whole = distribute_tensor(own.detach(), mesh, [place])
        owner, _, key = name.rpartition(".")
        new = nn.Parameter(whole, own.requires_grad) if isinstance(own, nn.Parameter) else whole
        setattr(adapter.get_submodule(owner), key, new)


def reduce_partial_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum up gradients of which each process computed a part, where parameters that all hold whole meet split ones.

    Torch's optimizers would do so by themselves, at each use; what reads gradients before may not.
    """
    for parameter in parameters:
        own, gradient = parameter, parameter.grad
        if isinstance(own, DTensor) and isinstance(gradient, DTensor) and gradient.placements != own.placements:
            parameter.grad = gradient.redistribute(placements=own.placements)


@torch.no_grad()
def broadcast_values(tensors: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Give all processes of a mesh the values that its first one has; what is sharded or not there yet is left out."""
    for tensor in tensors:
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            values = tensor.detach().to(mesh.device_type).contiguous()
            dist.broadcast(values, group=mesh.get_group(), group_src=0)
            tensor.copy_(values)
