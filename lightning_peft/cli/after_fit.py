"""``finish_fit``: what follows the training of ``lightning-peft fit``: the adapter's folder, a test, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from ..checkpoints.companion_files import tokenizer_of
from ..checkpoints.save_load import save_adapter
from ..core.console import echo
from ..core.injection_record import get_record
from .run_report import show_next, write_report
from .test_rows import TestRows
from .validation_metrics import ValidationMetrics


def finish_fit(trainer: pl.Trainer, model: pl.LightningModule, data: Any, adapter_dir: str | None, tests: bool) -> None:
    """Save the adapter of the best checkpoint, test it if asked, and report.

    Args:
        trainer: Of the fit.
        model: The trained module, which gets the values of the best checkpoint.
        data: Its data, if there is some.
        adapter_dir: Where the adapter goes; by default into the folder of the run's logs.
        tests: Whether to test.
    """
    if getattr(trainer, "fast_dev_run", False) or trainer.interrupted:
        return
    best, state = getattr(trainer.checkpoint_callback, "best_model_path", ""), dict[str, Any]()
    if best:
        state = trainer.strategy.load_checkpoint(best, weights_only=True)
        trainer.strategy.load_model_state_dict(state)
    results = ValidationMetrics.of(trainer, state)
    logs, adapter = Path(trainer.log_dir or trainer.default_root_dir), None  # which processes agree on
    if get_record(model) is not None:  # of a sharded model, each process has a part
        tokenizer = tokenizer_of(model) or tokenizer_of(data)
        adapter = save_adapter(model, adapter_dir or logs / "adapter", tokenizer=tokenizer)
    rows = TestRows()
    if tests:
        trainer.callbacks.append(rows)  # type: ignore[attr-defined]
        results |= trainer.test(model, datamodule=data, verbose=False)[0]
    rank_zero_only(write_report)(model, logs, best, results, adapter, rows)
    if adapter is not None:
        rank_zero_only(echo)(f"{'its values':<22}{name_values(trainer)}")
    rank_zero_only(show_next)(model, data, logs, adapter, rows)


def name_values(trainer: pl.Trainer) -> str:
    """Say when in a run the values were had that its adapter is saved with."""
    callback: Any = trainer.checkpoint_callback
    if not getattr(callback, "best_model_path", ""):
        return "those of the last step, since no checkpoint was saved"
    name = Path(callback.best_model_path).name
    if callback.monitor is None:
        return f"those of the last checkpoint, {name}; a ModelCheckpoint with monitor: val_loss keeps the best"
    return f"those of the best {callback.monitor}, {float(callback.best_model_score):.4f}, in {name}"
