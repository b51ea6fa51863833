"""Modes (train or eval) and precision of the modules that train and of those that are frozen."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, MixedPrecision, TransformerEnginePrecision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.adapted_module import adapters
from ..core.weight_backup import check_not_merged
from ..quantization.quantize import KINDS, quantize_once
from ..structure.base_model import base_modules, base_parameters, holds_adapters
from ..structure.transformers_api import checkpoint_without_reentry, is_checkpointing
from .distributed.lightning_strategies import SHARDING
from .lightning_api import trainer_of
from .lightning_namespace import is_instance


def check_modes(frozen_mode: str, cache_frozen: bool, quantize: str | None) -> None:
    """Raise where these settings of the callback are none, or do not go together."""
    if frozen_mode not in ("eval", "train"):
        raise ValueError(f"frozen_mode must be 'eval' or 'train', got {frozen_mode!r}.")
    if cache_frozen and frozen_mode == "train":
        raise ValueError("cache_frozen=True needs frozen_mode='eval': in 'train', the frozen modules are random.")
    if quantize not in (None, *KINDS):
        raise ValueError(f"quantize must be one of {', '.join(KINDS)} or None, got {quantize!r}.")


def check_precision_plugin(plugin: Any) -> None:
    """Raise where a Trainer's precision plugin would put layers of its own in place of adapted ones."""
    if is_instance(plugin, BitsandbytesPrecision):
        raise TypeError("BitsandbytesPrecision would replace adapted layers; use PEFTStrategy(quantize='nf4') instead.")
    if is_instance(plugin, TransformerEnginePrecision) and plugin.replace_layers is not False:
        raise TypeError(
            "TransformerEnginePrecision would replace adapted layers; give it replace_layers=False, or use bf16-mixed."
        )


def widen_trained(module: pl.LightningModule) -> None:
    """Cast base parameters that train in 16 bits to float32 under mixed precision, as adapters have it.

    Gradient scaling refuses parameters of 16 bits, and in bfloat16 small steps would be lost. Autocast lets the wide
    parameters meet a narrow base.
    """
    trainer = trainer_of(module)
    plugin = None if trainer is None else trainer.precision_plugin
    if is_instance(plugin, MixedPrecision):
        for part in base_modules(module).values():
            parameters = list(part.parameters(recurse=False))
            if any(p.requires_grad for p in parameters):  # a norm's weight and bias have to be of one type
                for parameter in [p for p in parameters if p.element_size() < 4 and (p.requires_grad or p.dim() < 2)]:
                    parameter.data = parameter.data.float()  # the same parameter: optimizers and other owners hold it


def quantize_base(module: pl.LightningModule, kind: str) -> None:
    """Quantize the base once; strategies that shard need codes that can be split, which torchao's NF4 has."""
    trainer = trainer_of(module)
    sharded = trainer is not None and is_instance(trainer.strategy, *SHARDING)
    quantize_once(module, kind, "torchao" if sharded and kind == "nf4" else None)


def check_trained(module: nn.Module) -> None:
    """Raise if adapters are merged or nothing trains, and warn where base parameters train in 16 bits."""
    check_not_merged(module)
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            "Nothing trains: no adapter takes part. Call lightning_peft.activate(model, name) for those that shall."
        )
    narrow = {n: p for n, p in base_parameters(module).items() if p.requires_grad and p.element_size() < 4}
    if narrow:
        dtype = next(iter(narrow.values())).dtype
        warnings.warn(
            f"{len(narrow)} base parameters train in {dtype} ({', '.join(list(narrow)[:3])}), which loses steps below "
            f"some {torch.finfo(dtype).eps / 2:.1g} of a value. With precision='bf16-mixed' they train in float32, "
            f"also where the base was loaded in 16 bits and stays so.",
            stacklevel=2,
        )


def set_mode(module: nn.Module, frozen: Literal["eval", "train"]) -> None:
    """Set the mode of all modules for training, and make gradient checkpointing work below frozen embeddings.

    Modules in which no base parameter trains get the mode ``frozen``, but for batch norm, which evaluates. Adapters
    train.
    """
    checkpoint_without_reentry(module)
    _set_frozen_mode(module, frozen)


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
