"""``OwnTypes``: Lightning's precision under FSDP1, without its casts of the frozen base."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ...ops.sharded_tensors import shard_of


class OwnTypes(FSDPPrecision):
    """Lightning's precision for FSDP1, as its other strategies know it.

    ``32-true`` casts nothing (Lightning's own casts a bfloat16 base to float32, twice its size), ``bf16-mixed`` is
    autocast on any device, and gradients can be clipped by their norm.

    Args:
        precision: As in the Trainer.
        device: Type of the device that computes.
    """

    def __init__(self, precision: Any, device: str) -> None:
        super().__init__(precision)
        self.device = device
        self.root: nn.Module | None = None

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast to the named type, if that is a lower one."""
        return module if self.precision == "32-true" else super().convert_module(module)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast, or a default type."""
        if "mixed" not in self.precision:
            return super().forward_context()
        return torch.autocast(self.device, torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16)

    def clip_grad_by_norm(self, optimizer: Any, clip_val: int | float) -> None:
        """Clip; of sharded gradients the norm is that of all processes together."""
        sharded = any(shard_of(p) is not None for group in optimizer.param_groups for p in group["params"])
        if sharded and isinstance(self.root, FullyShardedDataParallel):
            self.root.clip_grad_norm_(clip_val)
        else:
            Precision.clip_grad_by_norm(self, optimizer, clip_val)
