"""The callback's part that caches the frozen trunk: which hooks tell the cache what."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from .frozen_cache import FrozenCache
from .lightning_api import is_compiled

SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class CachingCallback(pl.Callback):
    """Caches what the frozen trunk returns, from the beginning of training to its end.

    Each rank caches its own rows; where a sampler deals them anew in each epoch, it knows few of them at first.

    Args:
        cache_frozen: Whether to.
        cache_folder: Where the file goes.
    """

    def __init__(self, cache_frozen: bool, cache_folder: str | None) -> None:
        super().__init__()
        self.cache_frozen, self.cache_folder = cache_frozen, cache_folder
        self._cache: FrozenCache | None = None
        self._first_epoch, self._has_warned = 0, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the trunk."""
        if not self.cache_frozen:
            return
        self._close()  # the learning-rate finder trains within fit
        if isinstance(trainer.strategy, SHARDING):
            raise TypeError("cache_frozen=True works on whole models, and the Trainer's strategy shards; use ddp.")
        if is_compiled(pl_module):
            raise TypeError("The module is compiled, and cache_frozen=True cuts parts of it out; do not compile it.")
        self._cache = FrozenCache(pl_module, self.cache_folder)
        self._first_epoch, self._has_warned = trainer.current_epoch, False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the cache compared in each epoch."""
        if self._cache is not None:
            self._cache.start_epoch()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start a step."""
        if self._cache is not None:
            self._cache.begin(batch, trains=True)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        """Refuse what caching does not fit, before anything changes."""
        self._check_first(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a step."""
        if self._cache is not None:
            self._check_first(trainer)
            self._cache.end()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start a step."""
        if self._cache is not None:
            self._cache.begin(batch, trains=False)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """End a step."""
        if self._cache is not None:
            self._cache.end()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn once where rows come that are not known."""
        if self._cache is None or self._has_warned or trainer.current_epoch == self._first_epoch:
            return
        report = self._cache.report()
        if report is not None:
            warnings.warn(report, stacklevel=2)
            self._has_warned = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget everything."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._close()

    def _close(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _check_first(self, trainer: pl.Trainer) -> None:
        if self._cache is None:
            return
        counts = [trainer.num_training_batches, *(n for n in trainer.num_val_batches if math.isfinite(n))]
        cost = self._cache.check_first(sum(counts))
        if cost is not None:
            rank_zero_info(cost)
