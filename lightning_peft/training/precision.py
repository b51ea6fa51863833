"""Types and bits of what trains and of the frozen base: checks of a Trainer's precision, and the casts it needs."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, MixedPrecision, TransformerEnginePrecision
from torch import nn

from ..core.weight_backup import check_not_merged
from ..quantization.quantize import quantize_once
from ..structure.base_model import base_modules, base_parameters
from .distributed.lightning_strategies import SHARDING
from .lightning_api import trainer_of
from .lightning_namespace import is_instance


def check_same_bits(before: str | None, now: str | None) -> None:
    """Raise where a checkpoint was trained over a base in other bits."""
    if before != now:
        raise ValueError(f"The checkpoint was trained with quantize={before!r}, this run has {now!r}.")


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


def check_trained(module: pl.LightningModule) -> None:
    """Raise if adapters are merged or nothing trains, and warn where 16 bits lose steps or gradients."""
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
    trainer = trainer_of(module)
    if trainer is not None and trainer.precision == "32-true":
        _warn_of_unscaled(module)


def _warn_of_unscaled(module: nn.Module) -> None:
    """Warn where gradients pass a base in float16 as they are; in bfloat16 they have the range of float32."""
    if any(parameter.dtype == torch.float16 for parameter in base_parameters(module).values()):
        warnings.warn(
            "The base is in float16, and precision='32-true' does not scale the loss: gradients below 6e-8 vanish. "
            "Train with precision='16-mixed' on a GPU, or load the base in bfloat16 or float32 (dtype=...).",
            stacklevel=3,
        )
