"""``FlatShard``: what a process holds of a parameter that FSDP1 has flattened, a run of its elements by rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...ops.sharded_tensors import set_shard


@dataclass(frozen=True)
class FlatShard:
    """Run of elements that this process holds of a whole tensor; a ``Shard`` of ``ops.sharded_tensors``.

    Args:
        global_shape: Shape of the whole.
        counts: How many elements each process holds, by rank.
        group: The processes.
    """

    global_shape: torch.Size
    counts: tuple[int, ...]
    group: dist.ProcessGroup

    @property
    def start(self) -> int:
        """The first element that this process holds."""
        return sum(self.counts[: self.group.rank()])

    def full(self, local_values: Tensor) -> Tensor:
        """Return the whole; all processes have to call it.

        Raises:
            RuntimeError: FSDP1 has the parameter gathered at this moment.
        """
        if local_values.numel() != self.counts[self.group.rank()]:
            raise RuntimeError("A parameter is read while FSDP1 has it gathered; read it between two steps.")
        longest = torch.zeros(max(self.counts), dtype=local_values.dtype, device=local_values.device)
        longest[: local_values.numel()] = local_values.detach().reshape(-1)
        runs = [torch.empty_like(longest) for _ in self.counts]
        dist.all_gather(runs, longest, group=self.group)
        flat = torch.cat([run[:count] for run, count in zip(runs, self.counts, strict=True)])
        return flat.view(self.global_shape)

    def local(self, values: Tensor) -> Tensor:
        """Return this process's elements of the whole."""
        return values.reshape(-1)[self.start : self.start + self.counts[self.group.rank()]]

    def sample(self, local_values: Tensor, positions: Tensor) -> Tensor:
        """Return the elements of the whole at these positions; all processes have to call it."""
        device = local_values.device
        inside = (positions >= self.start) & (positions < self.start + local_values.numel())
        values = torch.zeros(len(positions), dtype=local_values.dtype, device=device)
        values[inside.to(device)] = local_values.detach()[(positions[inside] - self.start).to(device)]
        dist.all_reduce(values, group=self.group)
        return values


def annotate_shards(shapes: Mapping[nn.Parameter, torch.Size], group: dist.ProcessGroup, device: torch.device) -> None:
    """Set the shard of parameters that were just flattened.

    Args:
        shapes: Their shapes before, in the same order on all processes.
        group: Processes over which they are spread.
        device: Device that the processes' backend sends from.
    """
    local_counts = torch.tensor([p.numel() for p in shapes], device=device)
    every = [torch.empty_like(local_counts) for _ in range(group.size())]
    dist.all_gather(every, local_counts, group=group)
    counts_by_parameter = torch.stack(every).t().tolist()
    for (parameter, shape), counts in zip(shapes.items(), counts_by_parameter, strict=True):
        if sum(counts) != shape.numel():
            raise RuntimeError(f"FSDP1 holds {sum(counts)} of {shape.numel()} elements; use FSDP2Strategy.")
        set_shard(parameter, FlatShard(shape, tuple(counts), group))
