"""``ValidationMetrics``: a Callback by which a checkpoint keeps the metrics of the validation before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

_KEY = "validation_metrics"  # of a checkpoint


class ValidationMetrics(pl.Callback):
    """Keeps what was logged up to the last validation, but for training; it must come before ``ModelCheckpoint``."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the metrics that are known now."""
        if not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
            self._last = {name: value for name, value in metrics.items() if not name.startswith("train")}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the metrics; not as the state of a callback, which Lightning would miss wherever it is not listed."""
        checkpoint[_KEY] = dict(self._last)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take those of the checkpoint that a fit goes on from."""
        self._last = dict(checkpoint.get(_KEY, {}))

    @classmethod
    def of(cls, trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics that belong to a checkpoint, or without one, those of the last validation."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        own = next(callback for callback in callbacks if isinstance(callback, cls))
        return dict(checkpoint.get(_KEY, {})) if checkpoint else dict(own._last)
