"""Every process has to bring the same frozen base: what sends nothing of it would not notice another."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import nn

from ...checkpoints.adapter_state import frozen_names
from ...core.fingerprint import fingerprint
from ...structure.quantized import sample


def check_one_base(module: nn.Module) -> None:
    """Compare the frozen bases of all processes.

    Raises:
        ValueError: They differ.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    found: list[str | None] = [None] * dist.get_world_size()
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
        if name in names and not buffer.is_meta:
            digest.update(sample(buffer).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
