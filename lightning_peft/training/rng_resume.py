"""The callback's part that lets a run go on where it stopped: each process's random numbers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from .rng_state import random_states, restore_random_state


class ResumingCallback(pl.Callback):
    """Keeps the states of the random generators in checkpoints, and sets them when training goes on."""

    _random: dict[str, Any] | None = None  # of a checkpoint, until training has taken it up
    _mid_epoch = _fits = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on before the first data loader draws its seed."""
        super().on_fit_start(trainer, pl_module)
        self._fits = True
        self._restore()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on inside an epoch, whose data loader the uninterrupted run had already."""
        super().on_train_start(trainer, pl_module)
        if self._random is not None and self._random.get("mid_epoch"):
            self._restore()
        self._random = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether the epoch goes on."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._mid_epoch = not trainer.is_last_batch

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        super().on_fit_end(trainer, pl_module)
        self._fits = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each process's random generators: dropout and shuffling go on where they stopped."""
        return {"states": random_states(), "mid_epoch": self._mid_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._random = state_dict
        if self._fits:  # strategies that shard load so late
            self._restore()

    def _restore(self) -> None:
        if self._random is not None:
            restore_random_state(self._random["states"])
