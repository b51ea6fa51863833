"""``shard_adapters`` splits adapters along with the weights of hosts that tensor parallelism has split."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from ..ops.torch_api import hooks
from ..structure.layer_of import is_called_linear
from .adapted_module import adapters
from .adapter import Adapter

_SIDES = {0: "out", 1: "in"}  # sides of the host's weight by dimension


def is_split(host: nn.Module) -> bool:
    """Return whether tensor parallelism has split a layer: its weight and, by hooks, its input and output."""
    parameters: Any = host._parameters  # no dict in scripted modules
    sharded = "weight" in parameters and isinstance(parameters["weight"], DTensor)
    return sharded and bool(hooks(host, "forward_pre")) and not isinstance(host, FSDPModule)


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """Return the mesh that tensor parallelism has split a model's layers over; None if it has not."""
    hosts: Iterable[Any] = model.modules()
    return next((host.weight.device_mesh for host in hosts if is_split(host)), None)


def split_side(host: nn.Module) -> str | None:
    """Return the side along which a host's weight is split: ``out`` (column-wise), ``in`` (row-wise) or None."""
    weight: Any = host._parameters["weight"]
    placement = weight.placements[0]
    supported = len(weight.placements) == 1 and isinstance(placement, Shard) and is_called_linear(host)
    return _SIDES.get(placement.dim) if supported else None


def check_tensor_parallel_support(host: nn.Module, name: str, key: str, adapter: Adapter) -> None:
    """Raise a ``TypeError`` if an adapter would not compute the same in a model that tensor parallelism has split."""
    subject = f"{type(adapter).__name__} {key!r} at {name or 'the root'}"
    if adapter.tensor_parallel_dims is None:
        raise TypeError(
            f"{subject} does not run under tensor parallelism, where each process has a part of the heads and "
            f"features. LoRA, IA3 and others do; FSDP2 and DDP run every method."
        )
    if any(getattr(part, "dropout", 0) for part in adapter.modules()):
        raise TypeError(f"{subject} has dropout, which each process would draw for itself; set it to 0.")
    if is_split(host) and (adapter.part or split_side(host) is None):
        raise TypeError(
            f"{subject} follows linear layers, whole, that are split column-wise or row-wise over one mesh."
        )


def shard_adapters(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the adapters of split hosts along with them; broadcast all other adapters and trained parameters.

    Dimensions that run along the split side of the host are split; each process holds the other tensors of such an
    adapter whole. A second call changes nothing.
    """
    for _, host, _, adapter in adapters(model):
        if is_split(host):
            _split(adapter, split_side(host), mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    of_adapters = [tensor for *_, adapter in adapters(model) for tensor in (*adapter.parameters(), *adapter.buffers())]
    broadcast_values((*trained, *of_adapters), mesh)


def _split(adapter: Adapter, side: str | None, mesh: DeviceMesh) -> None:
    for name, tensor in [*adapter.named_parameters(), *adapter.named_buffers()]:
        if isinstance(tensor, DTensor):
            continue
        axes = (adapter.tensor_parallel_dims or {}).get(name, ())
        placement: Placement = Shard(axes.index(side)) if side in axes else Replicate()
        distributed = distribute_tensor(tensor.detach(), mesh, [placement])
        owner, _, key = name.rpartition(".")
        new = nn.Parameter(distributed, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else distributed
        setattr(adapter.get_submodule(owner), key, new)


def reduce_partial_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum gradients of which each process holds a partial one: of replicated parameters that split tensors meet.

    Torch's optimizers would do so at each use; code that reads gradients before them, such as clipping, may not.
    """
    for parameter in parameters:
        tensor, gradient = parameter, parameter.grad
        if isinstance(tensor, DTensor) and isinstance(gradient, DTensor) and gradient.placements != tensor.placements:
            parameter.grad = gradient.redistribute(placements=tensor.placements)


@torch.no_grad()
def broadcast_values(tensors: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Broadcast values from the first process of a mesh; sharded tensors and tensors without values are left out."""
    for tensor in tensors:
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            values = tensor.detach().to(mesh.device_type).contiguous()
            dist.broadcast(values, group=mesh.get_group(), group_src=0)
            tensor.copy_(values)
