"""How modules behave in training: what evaluates, and how activations are recomputed."""

from __future__ import annotations

import warnings
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.adapted_module import adapters
from ..structure.base_model import ADAPTERS_ATTRIBUTE, base_parameters
from ..structure.transformers_api import is_checkpointing


def set_mode(module: nn.Module, frozen: Literal["eval", "train"]) -> None:
    """Set the mode of what holds no trained base parameter; adapters always train. Batch norm there never does."""
    trained = {name for name, p in base_parameters(module).items() if p.requires_grad}
    for name, part in module.named_children():
        if name == ADAPTERS_ATTRIBUTE:
            part.train()
        elif any(n.startswith(f"{name}.") for n in trained):
            set_mode(part, frozen)
        elif any(True for _ in part.parameters()) or isinstance(part, _BatchNorm):
            part.train(frozen == "train")
            for inner in part.modules():
                if isinstance(inner, _BatchNorm):
                    inner.eval()
                elif is_checkpointing(inner):
                    _recompute(inner)
            for _, _, _, adapter in adapters(part):
                adapter.train()


def _recompute(block: nn.Module) -> None:
    """Let a block of transformers recompute, which it does in training alone; what is in it stays in its mode."""
    if any(isinstance(value, float) and value > 0 for name, value in vars(block).items() if "drop" in name):
        if not block.training:
            warnings.warn(
                f"{type(block).__name__} would drop activations itself in training, so that it evaluates and does not "
                f"recompute them; use frozen_mode='train' to save their memory.",
                stacklevel=2,
            )
    else:
        block.training = True
