"""What exact resuming trusts of Lightning's loops, nearly all private: nothing else of the package touches it.

A test says in words what a release no longer has.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple


class Position(NamedTuple):
    """Where training stands.

    ``phase`` is between epochs, epoch end, batch end, step, validation, validated, or stopped: a limit of steps or
    time, or early stopping, has cut the epoch short.
    """

    phase: str
    batches: int
    is_last: bool


def position(trainer: Any) -> Position:
    """Return where training stands, by Lightning's own counters."""
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress.current
    is_last = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    if 0 < epochs.started == epochs.processed and not is_last and trainer.fit_loop.epoch_loop.done:
        return Position("stopped", batches.processed, False)
    if epochs.processed == epochs.completed + 1:
        return Position("epoch end", batches.processed, True)
    if epochs.started == epochs.processed:
        return Position("between epochs", batches.processed, True)
    if trainer.validating:
        done = _validation(trainer).batch_progress
        phase = "validated" if done.is_last_batch and done.current.ready == done.current.completed else "validation"
    elif batches.ready == batches.processed + 1:
        phase = "step"
    else:
        phase = "batch end" if batches.processed == batches.completed + 1 else "validated"
    return Position(phase, batches.processed, is_last and phase != "step")


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Have a checkpoint say that its epoch is in work: Lightning counts one that was cut short as completed."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts["processed"] = counts["completed"] = counts["started"] - 1


def start_next_epoch(trainer: Any, ended: bool) -> None:
    """Have a resumed fit start the next epoch as an undisturbed one does, with loaders iterated anew.

    Args:
        trainer: The Trainer, in ``on_train_start``.
        ended: Whether the checkpoint was written at the end of an epoch, by callbacks that are not called again.
    """
    loop = trainer.fit_loop
    if ended:  # what waits for metrics steps after the callbacks
        loop.epoch_progress.current.completed = loop.epoch_progress.current.processed - 1
        loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        if ended:
            progress.completed = progress.processed
        progress.ready = progress.started  # on_train_epoch_start is called again
    loop._restarting = loop._resuming_from_checkpoint = False
    loop._restart_stage = "none"
    loop.epoch_loop.restarting = False


def continue_epoch(trainer: Any, at: Position) -> None:
    """Have a resumed fit go on after a batch with what an undisturbed one does next: validation, then a batch."""
    loop, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epoch.reset = functools.partial(_reset_quietly, epoch)
    if at.phase == "batch end":
        if at.is_last and loop.restarted_mid_epoch:
            _take_back_epoch(loop)
        epoch.batch_progress.increment_completed()
        epoch._restart_stage = "restarted_on_last"
    due = epoch._should_check_val_fx(loop._data_fetcher)
    if at.phase == "validation" or (at.phase == "batch end" and due):
        _validation(trainer).restarting = False
        _validation(trainer)._restart_stage = "restarted_mid_evaluation"  # the epoch's loop runs it before a batch
    elif at.phase == "batch end" and not epoch._should_accumulate():
        epoch._batches_that_stepped += 1
    elif at.phase == "stopped" and due and not epoch._should_accumulate():
        epoch._batches_that_stepped -= 1  # counted when it stopped, and again where validation is left out
    elif at.phase == "step":
        epoch.batch_progress.total.reset_on_restart()  # of the step that is done again, else it counts twice
    loop._restarting = False  # of this loop alone: else what waits for metrics misses the epoch's end


def _reset_quietly(epoch: Any) -> None:
    """Reset the epoch's loop, once, without Lightning's warning that loaders cannot resume: these do."""
    del epoch.reset
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
        epoch.reset()


def _take_back_epoch(loop: Any) -> None:
    """Undo that Lightning counts an epoch whose last batch has ended, and goes on without validation and its end."""
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        progress.processed -= 1
        progress.completed -= 1


def reload_epoch(trainer: Any) -> float:
    """Return the epoch in which the train loaders were made; before there is one, a negative number."""
    return float(trainer.fit_loop._last_train_dl_reload_epoch)


def set_reload_epoch(trainer: Any, epoch: float) -> None:
    """Have ``reload_dataloaders_every_n_epochs`` count from an epoch."""
    trainer.fit_loop._last_train_dl_reload_epoch = epoch


def _validation(trainer: Any) -> Any:
    return trainer.fit_loop.epoch_loop.val_loop


def monitored(trainer: Any) -> dict[str, float]:
    """Return the metrics that schedulers of the learning rate wait for, as they are: to ask for them would compute."""
    names = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
    return {name: float(value) for name, value in trainer._logger_connector._callback_metrics.items() if name in names}


def keep_monitored(trainer: Any, values: dict[str, float]) -> None:
    """Have schedulers find metrics of before, until there are new ones."""
    loop = trainer.fit_loop.epoch_loop
    loop._get_monitor_value = functools.partial(_monitored, trainer, values)


def _monitored(trainer: Any, values: dict[str, float], name: str) -> Any:
    return trainer.callback_metrics.get(name, values.get(name))
