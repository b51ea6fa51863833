"""Data parallel training: each process brings the same frozen base, so that nothing of it is ever sent."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...checkpoints.adapter_state import frozen_names


class FrozenNames:
    """Names of what the frozen base of a module holds, looked up whenever they are asked for.

    DDP asks when it wraps the module; until then more of it may be unfrozen.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __iter__(self) -> Iterator[str]:
        return iter(frozen_names(self.module))


def ignore_base_in_ddp(module: nn.Module) -> None:
    """Let DDP send what trains, adapters whole: no frozen weights at its start, no frozen buffers before each step."""
    module.__dict__["_ddp_params_and_buffers_to_ignore"] = FrozenNames(module)
