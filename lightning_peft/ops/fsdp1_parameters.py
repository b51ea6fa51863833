"""Parameters that FSDP1 has flattened: each process holds a run of their elements, in the order of the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

_PART = "_peft_part"


@dataclass(frozen=True)
class FlatShard:
    """Which elements of a whole a process holds.

    Args:
        shape: Of the whole.
        counts: How many elements each process holds, by rank.
        group: The processes.
    """

    shape: torch.Size
    counts: tuple[int, ...]
    group: dist.ProcessGroup

    @property
    def start(self) -> int:
        """The first element that this process holds."""
        return sum(self.counts[: self.group.rank()])

    def gather(self, own: Tensor) -> Tensor:
        """Return the whole; all processes have to ask for it.

        Raises:
            RuntimeError: The parameter is gathered at this moment.
        """
        if own.numel() != self.counts[self.group.rank()]:
            raise RuntimeError("A parameter is read while FSDP1 has it gathered; read it between two steps.")
        longest = torch.zeros(max(self.counts), dtype=own.dtype, device=own.device)
        longest[: own.numel()] = own.detach().reshape(-1)
        every = [torch.empty_like(longest) for _ in self.counts]
        dist.all_gather(every, longest, group=self.group)
        return torch.cat([part[:count] for part, count in zip(every, self.counts, strict=True)]).view(self.shape)

    def cut(self, values: Tensor) -> Tensor:
        """Return this process's elements of the whole."""
        return values.reshape(-1)[self.start : self.start + self.counts[self.group.rank()]]


def annotate_shards(shapes: Mapping[nn.Parameter, torch.Size], group: dist.ProcessGroup, device: torch.device) -> None:
    """Note on parameters that were just flattened what they are parts of.

    Args:
        shapes: What they were before, in the same order everywhere.
        group: Over which processes they are spread.
        device: Where the processes' backend sends from.
    """
    own = torch.tensor([p.numel() for p in shapes], device=device)
    every = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(every, own, group=group)
    counts = torch.stack(every).t().tolist()
    for (parameter, shape), found in zip(shapes.items(), counts, strict=True):
        if sum(found) != shape.numel():
            raise RuntimeError(f"FSDP1 holds {sum(found)} of {shape.numel()} elements; use FSDP2Strategy.")
        setattr(parameter, _PART, FlatShard(shape, tuple(found), group))


def shard_of(tensor: Tensor) -> FlatShard | None:
    """Return which part of a whole this very parameter is, or None where it is no part."""
    return getattr(tensor, _PART, None)


def check_known_shards(model: nn.Module) -> None:
    """Raise where FSDP1 has flattened parameters and nothing is noted on them.

    Raises:
        TypeError: What is read of them would be a part, without a shape.
    """
    flattened = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    hidden = [name for name, _ in model.named_parameters() if name.endswith("_flat_param")]
    spread = any(module.sharding_strategy != ShardingStrategy.NO_SHARD for module in flattened)
    if hidden or (spread and all(shard_of(parameter) is None for parameter in model.parameters())):
        raise TypeError(
            f"{type(model).__name__} was wrapped in FSDP1 by other hands, so shapes and values of its parameters are "
            f"not known here. Use FSDP1Strategy, or fully_shard of FSDP2."
        )
