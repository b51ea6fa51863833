"""What ``PEFTCLI`` checks and prepares before a fit, and before evaluations that start from an adapter folder."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.overrides import is_overridden

from ..checkpoints.save_load import load_adapter
from ..core.adapter_folder import CONFIG
from ..files.storage import is_file, is_folder, joined
from ..training.prediction_writer import PredictionWriter

EVALUATIONS = ("validate", "test", "predict")


def check_accelerator(accelerator: Any) -> None:
    """Raise if a GPU is asked for and torch finds none, before a model is read for it.

    Args:
        accelerator: What the Trainer is given.

    Raises:
        ValueError: There is no GPU that torch can use.
    """
    if accelerator in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        built = (
            f"this torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is a CPU build"
        )
        raise ValueError(
            f"trainer.accelerator is {accelerator!r}, and torch finds no GPU here ({built}). Train on the CPU by "
            f"--trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto, or install a driver and a torch "
            f"for your GPU."
        )


def check_fit(model: pl.LightningModule, data: Any, tests: bool, checkpoint: Any) -> None:
    """Raise for what would fail only once the training is over, or where a fit cannot start.

    Args:
        model: The module.
        data: Its data, if there is some.
        tests: Whether a test follows the fit.
        checkpoint: Where the fit goes on.

    Raises:
        ValueError: There is nothing to test on, or the checkpoint is the folder of an adapter.
    """
    if _is_adapter_folder(checkpoint):
        raise ValueError(
            f"ckpt_path={str(checkpoint)!r} is the folder of an adapter, which has no state of an optimizer. Give a "
            f"checkpoint of the run (.ckpt) to go on with the training."
        )
    if not tests:
        return
    step = None if is_overridden("test_step", model, pl.LightningModule) else f"{type(model).__name__} has no test_step"
    missing = step or _lacks_test(data if data is not None else model)
    if missing is not None:
        raise ValueError(
            f"test_after_fit is true, but {missing}. Give the data a test set, or set test_after_fit to false."
        )


def _lacks_test(data: Any) -> str | None:
    """Return what says that data have no test set; None where they may have one."""
    kinds = (pl.LightningDataModule, pl.LightningModule)
    parent = next((kind for kind in kinds if isinstance(data, kind)), None)
    if parent is not None and not is_overridden("test_dataloader", data, parent):
        return f"{type(data).__name__} has no test_dataloader"
    for part in [data, *getattr(data, "tasks", {}).values()]:
        splits = getattr(part, "splits", None)
        if splits is not None and not splits.has("test"):
            return "the data has test=null"
    return None


def load_adapter_folder(model: pl.LightningModule, checkpoint: Any) -> Any:
    """Load an adapter whose folder stands for a checkpoint; return what is still to load, or None."""
    if not _is_adapter_folder(checkpoint):
        return checkpoint
    model.configure_model()
    load_adapter(model, checkpoint)
    return None


def _is_adapter_folder(path: Any) -> bool:
    return path is not None and is_folder(path) and is_file(joined(path, CONFIG))


def add_prediction_writer(trainer: pl.Trainer, path: str | None) -> None:
    """Have predictions written, unless a callback of the Trainer does so already and no path is given."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if path is not None or not any(isinstance(callback, PredictionWriter) for callback in callbacks):
        callbacks.append(PredictionWriter(path))
