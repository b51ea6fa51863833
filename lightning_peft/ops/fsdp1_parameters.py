"""``FlatShard``: the elements of an FSDP1-flattened parameter that each process holds, in the order of the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

_SHARD = "_peft_part"


@dataclass(frozen=True)
class FlatShard:
    """Elements of a parameter that this process holds.

    Args:
        shape: Shape of the full parameter.
        counts: Number of elements that each process holds, by rank.
        group: Processes that hold them.
    """

    shape: torch.Size
    counts: tuple[int, ...]
    group: dist.ProcessGroup

    @property
    def start(self) -> int:
        """The first element that this process holds."""
        return sum(self.counts[: self.group.rank()])

    def gather(self, shard: Tensor) -> Tensor:
        """Return the full parameter; all processes have to call it.

        Raises:
            RuntimeError: FSDP1 has gathered the parameter, as during a step.
        """
        if shard.numel() != self.counts[self.group.rank()]:
            raise RuntimeError("A parameter is read while FSDP1 has it gathered; read it between two steps.")
        padded = torch.zeros(max(self.counts), dtype=shard.dtype, device=shard.device)
        padded[: shard.numel()] = shard.detach().reshape(-1)
        shards = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(shards, padded, group=self.group)
        return torch.cat([x[:count] for x, count in zip(shards, self.counts, strict=True)]).view(self.shape)

    def cut(self, values: Tensor) -> Tensor:
        """Return this process's elements of a full tensor."""
        return values.reshape(-1)[self.start : self.start + self.counts[self.group.rank()]]


def annotate_shards(shapes: Mapping[nn.Parameter, torch.Size], group: dist.ProcessGroup, device: torch.device) -> None:
    """Attach a ``FlatShard`` to parameters that FSDP1 has just flattened.

    Args:
        shapes: Shapes of the parameters before, in the same order on all processes.
        group: Processes that hold the shards.
        device: Device that the backend of the group sends from.
    """
    local_counts = torch.tensor([p.numel() for p in shapes], device=device)
    by_rank = [torch.empty_like(local_counts) for _ in range(group.size())]
    dist.all_gather(by_rank, local_counts, group=group)
    for (parameter, shape), counts in zip(shapes.items(), torch.stack(by_rank).t().tolist(), strict=True):
        if sum(counts) != shape.numel():
            raise RuntimeError(f"FSDP1 holds {sum(counts)} of {shape.numel()} elements; use FSDP2Strategy.")
        setattr(parameter, _SHARD, FlatShard(shape, tuple(counts), group))


def shard_of(tensor: Tensor) -> FlatShard | None:
    """Return the ``FlatShard`` of a parameter; None unless FSDP1 has flattened it."""
    return getattr(tensor, _SHARD, None)


def check_known_shards(model: nn.Module) -> None:
    """Raise where FSDP1 has flattened parameters that have no ``FlatShard``.

    Raises:
        TypeError: Their values would be read as flat shards, without a shape.
    """
    flattened = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    hidden = [name for name, _ in model.named_parameters() if name.endswith("_flat_param")]
    spread = any(module.sharding_strategy != ShardingStrategy.NO_SHARD for module in flattened)
    if hidden or (spread and all(shard_of(parameter) is None for parameter in model.parameters())):
        raise TypeError(
            f"{type(model).__name__} was wrapped in FSDP1 by other hands, so shapes and values of its parameters are "
            f"not known here. Use FSDP1Strategy, or fully_shard of FSDP2."
        )
