"""How modules behave in training: what evaluates, and how activations are recomputed."""

from __future__ import annotations

import functools
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .base import SLOT, base_parameters
from .hosts import adapters


def set_mode(module: nn.Module, frozen: Literal["eval", "train"]) -> None:
    """Set the mode of what holds no trained base parameter; adapters always train. Batch norm there never does."""
    trained = {name for name, p in base_parameters(module).items() if p.requires_grad}
    for name, part in module.named_children():
        if name == SLOT:
            part.train()
        elif any(n.startswith(f"{name}.") for n in trained):
            set_mode(part, frozen)
        elif any(True for _ in part.parameters()) or isinstance(part, _BatchNorm):
            part.train(frozen == "train")
            for inner in part.modules():
                if isinstance(inner, _BatchNorm):
                    inner.eval()
            for _, _, _, adapter in adapters(part):
                adapter.train()


def checkpoint_without_reentry(module: nn.Module) -> None:
    """Let transformers' gradient checkpointing work below frozen embeddings, where the reentrant kind gives none."""
    for part in module.modules():
        function = vars(part).get("_gradient_checkpointing_func")
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True):
            part._gradient_checkpointing_func = functools.partial(  # type: ignore[assignment]
                function.func, *function.args, **{**function.keywords, "use_reentrant": False}
            )
