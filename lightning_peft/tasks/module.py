"""What the ready LightningModules share."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from lightning_peft.restoring import KEY, inject_from_checkpoint
from lightning_peft.tasks.optimization import adamw


class TaskModule(LightningModule):
    """Module whose hyperparameters name its optimization, and which reads checkpoints that hold adapters only."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the adapters of such a checkpoint, so that ``load_from_checkpoint`` reads it."""
        if KEY in checkpoint:
            inject_from_checkpoint(self, checkpoint)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over what requires a gradient, with the schedule."""
        names = ("learning_rate", "weight_decay", "warmup_fraction", "schedule")
        return adamw(self, **{name: self.hparams[name] for name in names})
