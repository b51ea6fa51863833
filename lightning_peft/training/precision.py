"""What trains is wide, whatever a Trainer's precision plugin makes of the base."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, MixedPrecision, TransformerEnginePrecision
from torch import nn

from ..structure.base_model import base_modules, base_parameters
from .lightning_api import trainer_of


def check_precision_plugin(plugin: Any) -> None:
    """Raise where a plugin would put layers of its own in place of adapted ones."""
    if isinstance(plugin, BitsandbytesPrecision):
        raise TypeError("BitsandbytesPrecision would replace adapted layers; use PEFTStrategy(quantize='nf4') instead.")
    if isinstance(plugin, TransformerEnginePrecision) and plugin.replace_layers is not False:
        raise TypeError(
            "TransformerEnginePrecision would replace adapted layers; give it replace_layers=False, or use bf16-mixed."
        )


def widen_trained(module: pl.LightningModule) -> None:
    """Give base parameters that train in 16 bits the width of adapters, where autocast lets them meet a narrow base.

    Gradient scaling refuses others; in bfloat16, small steps would be lost.
    """
    trainer = trainer_of(module)
    plugin = None if trainer is None else trainer.precision_plugin
    if isinstance(plugin, MixedPrecision):
        for part in base_modules(module).values():
            own = dict(part.named_parameters(recurse=False))
            if any(p.requires_grad for p in own.values()):  # a norm's weight and bias have to be of one type
                for parameter in [p for p in own.values() if p.element_size() < 4 and (p.requires_grad or p.dim() < 2)]:
                    parameter.data = parameter.data.float()  # the same parameter: optimizers and other owners hold it


def warn_of_narrow(module: nn.Module) -> None:
    """Warn where base parameters train in 16 bits."""
    narrow = _narrow(module)
    if narrow:
        kind = next(iter(narrow.values())).dtype
        warnings.warn(
            f"{len(narrow)} base parameters train in {kind} ({', '.join(list(narrow)[:3])}), which loses steps below "
            f"some {torch.finfo(kind).eps / 2:.1g} of a value. With precision='bf16-mixed' they train in float32, also "
            f"where the base was loaded in 16 bits and stays so.",
            stacklevel=2,
        )


def _narrow(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in base_parameters(module).items() if p.requires_grad and p.element_size() < 4}
