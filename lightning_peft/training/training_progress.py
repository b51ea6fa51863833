"""``estimated_steps`` and ``expected_steps``: how many steps an optimizer takes in a run."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from .lightning_namespace import is_instance


def estimated_steps(trainer: pl.Trainer, module: pl.LightningModule) -> int:
    """Return how many steps each optimizer will take, before the first one; -1 if that is not known.

    In manual optimization, each optimizer is taken to step once for each batch.
    """
    total = trainer.estimated_stepping_batches
    if not module.automatic_optimization and trainer.max_steps > 0:
        total = min(total, trainer.max_steps // max(1, len(trainer.optimizers)))
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    scheduler = next((c for c in callbacks if is_instance(c, GradientAccumulationScheduler)), None)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or -1
    if scheduler is not None and batches < math.inf and epochs > 0:  # Lightning takes the first epoch's number for all
        factors = [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
        total = sum(math.ceil(batches / factor) for factor in factors)
        total = min(total, trainer.max_steps) if trainer.max_steps > 0 else total
    return -1 if math.isinf(total) else int(total)


def expected_steps(trainer: pl.Trainer, count: int) -> int:
    """Return how many steps an optimizer will have taken at the end of a run, after its first ``count`` steps.

    In manual optimization, the module decides in which batches an optimizer steps; as many steps are expected of the
    rest of the run as there were in the part that is done. -1 if the run has no end.
    """
    shares = []
    if trainer.max_steps > 0:
        shares.append((trainer.global_step + 1) / trainer.max_steps)  # Lightning has not counted the last step yet
    batches = trainer.num_training_batches * (trainer.max_epochs or -1)
    if 0 < batches < math.inf:
        shares.append((trainer.fit_loop.total_batch_idx + 1) / batches)
    return max(count, round(count / max(shares))) if shares else -1
