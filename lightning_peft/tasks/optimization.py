"""Optimizers with a warm-up and a decay per step: AdamW (arXiv:1711.05101) and Adafactor (arXiv:1804.04235)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.nn import Parameter
from torch.optim import Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "cosine", "linear"]


def check_optimization(learning_rate: float, weight_decay: float, warmup_fraction: float) -> None:
    """Refuse values that cannot train.

    Args:
        learning_rate: Above 0.
        weight_decay: 0 or above.
        warmup_fraction: From 0 to below 1.
    """
    if not learning_rate > 0:
        raise ValueError(f"Got learning_rate={learning_rate}, expected a number above 0, such as 5e-4.")
    if not weight_decay >= 0:
        raise ValueError(f"Got weight_decay={weight_decay}, expected 0 or above.")
    if not 0 <= warmup_fraction < 1:
        raise ValueError(
            f"Got warmup_fraction={warmup_fraction}, expected a share of all steps from 0 to below 1, such as 0.06."
        )


def adamw(
    module: LightningModule, learning_rate: float, weight_decay: float, warmup_fraction: float, schedule: Schedule
) -> OptimizerLRSchedulerConfig:
    """AdamW over the parameters that require a gradient, with a learning rate that changes at every step.

    Args:
        module: Attached to a Trainer, which knows the number of steps.
        learning_rate: Its highest value.
        weight_decay: AdamW's decoupled weight decay.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What follows the warm-up, as `multiplier` computes it.
    """
    optimizer = AdamW(_trained(module), lr=learning_rate, weight_decay=weight_decay)
    return _scheduled(module, optimizer, warmup_fraction, schedule)


def adafactor(
    module: LightningModule, learning_rate: float, warmup_fraction: float, schedule: Schedule
) -> OptimizerLRSchedulerConfig:
    """Adafactor as T5 and T-Few use it: steps scaled by each parameter's root mean square, no relative step.

    The same as transformers' with scale_parameter=True and relative_step=False, whose 1e-30 is the square of the first
    epsilon here. Torch's default for it, the type's precision, would mute gradients below 1e-7; 0 would divide by zero
    where a gradient is. Past step 1/rate^2 (111,111 at 3e-3) torch lowers the rate to 1/sqrt(step).

    Args:
        module: Attached to a Trainer, which knows the number of steps.
        learning_rate: Its highest value.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What follows the warm-up, as `multiplier` computes it.
    """
    optimizer = Adafactor(_trained(module), lr=learning_rate, eps=(1e-15, 1e-3))
    return _scheduled(module, optimizer, warmup_fraction, schedule)


def _trained(module: LightningModule) -> list[Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _scheduled(
    module: LightningModule, optimizer: Optimizer, warmup_fraction: float, schedule: Schedule
) -> OptimizerLRSchedulerConfig:
    total = module.trainer.estimated_stepping_batches
    if math.isinf(total):
        if schedule != "constant" or warmup_fraction > 0:
            raise ValueError(
                f"schedule={schedule!r} with warmup_fraction={warmup_fraction} needs a last step, but the Trainer has "
                "none. Set max_epochs or max_steps, or use schedule='constant' with warmup_fraction=0."
            )
        total = 0
    scheduler = LambdaLR(optimizer, multiplier(int(total), warmup_fraction, schedule))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def multiplier(total: int, warmup_fraction: float, schedule: Schedule) -> Callable[[int], float]:
    """The learning rate's factor at a step: a line up to 1, then a constant, a line or half a cosine to 0.

    With w warm-up steps the first ones use 1/(w+1), 2/(w+1), ...: no step is lost at rate 0, neither the first nor
    the last.

    Args:
        total: Number of optimizer steps.
        warmup_fraction: Share of them that warm up.
        schedule: ``constant``, ``linear`` or ``cosine``.
    """
    warmup = int(warmup_fraction * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor
