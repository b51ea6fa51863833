"""``broadcast_trained``, ``average_gradients``: tensors that every process holds whole stay equal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def broadcast_adapters(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Give all processes the values that the first one has.

    Args:
        tensors: On any device, in the same order everywhere.
        device: Where the processes' backend sends from.
    """
    for same_type in _by_type(tensors):
        _exchange(same_type, device, lambda flat: dist.broadcast(flat, 0))


def broadcast_trained(module: nn.Module, device: torch.device, without: Collection[nn.Parameter] = ()) -> None:
    """Give all processes the first one's values of what trains and is not sharded, with the buffers beside it.

    Args:
        module: Where to look.
        device: Where the processes' backend sends from.
        without: Parameters to leave out.
    """
    excluded = {id(p) for p in without}
    trained = {id(p): p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)}
    parameters = {key: p for key, p in trained.items() if key not in excluded}
    owners = (part for part in module.modules() if any(id(p) in parameters for p in part.parameters(recurse=False)))
    buffers = (buffer for owner in owners for buffer in owner.buffers(recurse=False))
    broadcast_adapters([*parameters.values(), *buffers], device)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace gradients by their means over a group; a gradient that no process has stays None.

    Calling it again after more was added to the gradients gives the mean of the sums.
    """
    if not parameters or group.size() == 1:
        return
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    missing = [p for p in parameters if p.grad is None]
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    for same_type in _by_type([p.grad for p in parameters if p.grad is not None] + [has]):
        _exchange(same_type, has.device, lambda flat: dist.all_reduce(flat.div_(group.size()), group=group))
    if missing:
        for parameter, count in zip(parameters, has.tolist(), strict=True):
            if not count:
                parameter.grad = None


def _by_type(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    types = dict.fromkeys(tensor.dtype for tensor in tensors)
    return [[tensor for tensor in tensors if tensor.dtype == dtype] for dtype in types]


def _exchange(tensors: Sequence[Tensor], device: torch.device, send: Callable[[Tensor], object]) -> None:
    """Send tensors of one type as one flat tensor, and copy what comes back into them."""
    flat = torch.cat([tensor.detach().reshape(-1).to(device) for tensor in tensors])
    send(flat)
    for tensor, values in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
