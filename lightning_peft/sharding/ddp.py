"""Data parallel training: each process brings the same frozen base, so that nothing of it is ever sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from ..checkpoint import frozen_names
from ..fingerprints import fingerprint
from ..quantized_layers import sample


class FrozenNames:
    """Names of what the frozen base of a module holds, looked up whenever they are asked for.

    DDP asks when it wraps the module; until then more of it may be unfrozen.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __iter__(self) -> Iterator[str]:
        return iter(frozen_names(self.module))


def keep_base_at_home(module: nn.Module) -> None:
    """Let DDP send what trains, adapters whole: no frozen weights at its start, no frozen buffers before each step."""
    module.__dict__["_ddp_params_and_buffers_to_ignore"] = FrozenNames(module)


def require_one_base(trainer: pl.Trainer, module: nn.Module) -> None:
    """Compare the frozen bases of all processes, which DDP no longer makes equal.

    Raises:
        ValueError: They differ.
    """
    if not isinstance(trainer.strategy, DDPStrategy) or trainer.world_size == 1:
        return
    found: list[str | None] = [None] * trainer.world_size
    dist.all_gather_object(found, _digest(module))
    others = [rank for rank, digest in enumerate(found) if digest != found[0]]
    if others:
        raise ValueError(
            f"The frozen base of process {others[0]} is not that of process 0 ({found[others[0]]}, {found[0]}). Load "
            f"the same weights in every process; what is drawn at random needs seed_everything before it is built."
        )


def _digest(module: nn.Module) -> str:
    names, digest = frozen_names(module), hashlib.sha256(str(fingerprint(module)).encode())
    for name, buffer in module.named_buffers():
        if name in names:
            digest.update(sample(buffer).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
