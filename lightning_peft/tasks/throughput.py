"""``ThroughputModule`` logs how many tokens a second are trained on, padding left out."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection

from lightning_peft.tasks.module import TaskModule


class TokenCounter:
    """Counts tokens, and the time that it runs; no device has to wait for it."""

    def __init__(self) -> None:
        self._tokens: Tensor | None = None
        self._seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Let time run, unless it does."""
        self._since = perf_counter() if self._since is None else self._since

    def pause(self) -> None:
        """Let no time run until the next start."""
        if self._since is not None:
            self._seconds += perf_counter() - self._since
            self._since = None

    def add(self, mask: Tensor) -> None:
        """Count the tokens of a batch.

        Args:
            mask: 1 at each of them, 0 at padding.
        """
        count = mask.detach().sum()
        self._tokens = count if self._tokens is None else self._tokens + count

    def take(self) -> Tensor | None:
        """The tokens a second since the last call; None if there were none. Time goes on."""
        self.pause()
        tokens, seconds = self._tokens, self._seconds
        self._tokens, self._seconds = None, 0.0
        self.start()
        return None if tokens is None else tokens / max(seconds, 1e-9)


class ThroughputModule(TaskModule):
    """Logs ``tokens_per_second``, of all processes together, at each step that the Trainer logs.

    Time is that of training, with its data, and without validation.

    Args:
        metrics: Metrics of evaluation.
    """

    def __init__(self, metrics: MetricCollection) -> None:
        super().__init__(metrics)
        self._counter = TokenCounter()

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Let the time of tokens run."""
        super().on_train_batch_start(batch, batch_idx)
        self._counter.start()

    def on_train_batch_end(self, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Count the tokens of the batch."""
        self._counter.add(batch["attention_mask"])
        trainer: Any = self.trainer
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            self._log_rate()

    def on_validation_start(self) -> None:
        """Let no time of tokens run."""
        self._counter.pause()

    def on_train_epoch_end(self) -> None:
        """Log the rate of the epoch's last steps; let no time run between epochs."""
        self._log_rate()
        self._counter.pause()

    def _log_rate(self) -> None:
        if (rate := self._counter.take()) is not None:
            self.log("tokens_per_second", rate, sync_dist=True, reduce_fx="sum")
