"""``CachedTraining``: the frozen cache of one training after the other, or of none."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from .cache import FrozenCache


class CachedTraining:
    """Hands a Trainer's hooks to a ``FrozenCache`` while a training with one runs, and else does nothing.

    Args:
        enabled: Whether trainings have a cache.
        folder: Where the cache's file goes.
    """

    def __init__(self, enabled: bool, folder: str | None) -> None:
        self._enabled, self._folder = enabled, folder
        self.cache: FrozenCache | None = None  # while a training runs

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the cache of a training; one of a training within, as the learning-rate finder's, ends."""
        self.close()
        if self._enabled:
            self.cache = FrozenCache(trainer, module, self._folder)

    def start_epoch(self) -> None:
        """Have the cache compared."""
        if self.cache is not None:
            self.cache.start_epoch()

    def begin(self, batch: Any, trains: bool) -> None:
        """Start a step."""
        if self.cache is not None:
            self.cache.begin(batch, trains)

    def check_first(self, trainer: pl.Trainer) -> None:
        """Refuse what caching does not fit, before anything changes."""
        if self.cache is not None:
            self.cache.check_first(trainer)

    def end(self) -> None:
        """End a step."""
        if self.cache is not None:
            self.cache.end()

    def end_epoch(self, epoch: int) -> None:
        """Warn once if rows come that are not in the cache."""
        if self.cache is not None:
            self.cache.warn_of_misses(epoch)

    def close(self) -> None:
        """Remove the cache."""
        if self.cache is not None:
            self.cache.close()
            self.cache = None
