"""``ModuleModes``: the modes, train or eval, of the modules that train and of those that are frozen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.adapted_module import adapters
from ..quantization.quantize import KINDS
from ..structure.base_model import base_parameters, holds_adapters
from ..structure.transformers_api import checkpoint_without_reentry, is_checkpointing


def check_modes(frozen_mode: str, cache_frozen: bool, quantize: str | None) -> None:
    """Raise where these settings of the callback are none, or do not go together."""
    if frozen_mode not in ("eval", "train"):
        raise ValueError(f"frozen_mode must be 'eval' or 'train', got {frozen_mode!r}.")
    if cache_frozen and frozen_mode == "train":
        raise ValueError("cache_frozen=True needs frozen_mode='eval': in 'train', the frozen modules are random.")
    if quantize not in (None, *KINDS):
        raise ValueError(f"quantize must be one of {', '.join(KINDS)} or None, got {quantize!r}.")


class ModuleModes:
    """Sets modes for training, and the former ones again after it.

    Args:
        frozen: Mode of what holds no trained parameter.
    """

    def __init__(self, frozen: Literal["eval", "train"]) -> None:
        self._frozen = frozen
        self._before: dict[nn.Module, bool] = {}
        self._undo = list[Callable[[], None]]()

    def set(self, module: nn.Module) -> None:
        """Set the modes of all modules for training."""
        self._before = self._before or {part: part.training for part in module.modules()}
        self._undo += set_mode(module, self._frozen)

    def restore(self) -> None:
        """Set the modes that the modules had before."""
        for part, training in self._before.items():
            part.training = training
        for undo in self._undo:
            undo()
        self._before, self._undo = {}, []


def set_mode(module: nn.Module, frozen: Literal["eval", "train"]) -> list[Callable[[], None]]:
    """Set the mode of all modules for training, and make gradient checkpointing work below frozen embeddings.

    Modules in which no base parameter trains get the mode ``frozen``, but for batch norm, which evaluates. Adapters
    train.

    Returns:
        What undoes the latter.
    """
    _set_frozen_mode(module, frozen)
    return checkpoint_without_reentry(module)


def _set_frozen_mode(module: nn.Module, frozen: Literal["eval", "train"]) -> None:
    trained = {name for name, p in base_parameters(module).items() if p.requires_grad}
    for name, part in module.named_children():
        if holds_adapters(module, name):
            part.train()
        elif any(n.startswith(f"{name}.") for n in trained):
            _set_frozen_mode(part, frozen)
        elif next(part.parameters(), None) is not None or isinstance(part, _BatchNorm):
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
