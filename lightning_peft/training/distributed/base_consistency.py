"""Checks that every process holds the same frozen base, of which nothing is ever sent, and that no step changed it."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import nn

from ...checkpoints.adapter_state import frozen_names
from ...core.fingerprint import fingerprint, sample


def check_one_base(module: nn.Module) -> None:
    """Compare the frozen bases of all processes.

    Raises:
        ValueError: They differ.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, _digest(module))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"The frozen base of process {others[0]} is not that of process 0 ({digests[others[0]]}, {digests[0]}). "
            f"Load the same weights in every process; what is drawn at random needs seed_everything before it is built."
        )


def check_base_unchanged(module: nn.Module, before: str | None) -> None:
    """Raise a ``RuntimeError`` if the base has another fingerprint than before, where it had one."""
    if before is not None and fingerprint(module) != before:
        raise RuntimeError(
            "Frozen base weights changed during fit, so the adapter does not fit the base that it started from. "
            "Something other than the optimizer writes to them."
        )


def _digest(module: nn.Module) -> str:
    names, digest = frozen_names(module), hashlib.sha256(str(fingerprint(module)).encode())
    for name, buffer in module.named_buffers():
        if name in names and not buffer.is_meta:
            digest.update(sample(buffer).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
