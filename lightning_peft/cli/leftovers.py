"""``remove_empty_run`` leaves no folder behind of a run that failed before it wrote a result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl

_OF_NO_RESULT = ("config.yaml", "hparams.yaml")


@contextmanager
def remove_empty_run(trainer: pl.Trainer) -> Iterator[None]:
    """Context that, if it fails, removes the folder of a run's logs if the run made it and wrote settings alone.

    A run that was interrupted by the user, or that logged a step or saved a checkpoint, keeps its folder.

    Args:
        trainer: Of the run.
    """
    folder = _folder(trainer)
    existed = folder is not None and folder.exists()
    try:
        yield
    except Exception:
        if folder is not None and not existed and trainer.is_global_zero and _has_settings_alone(folder):
            shutil.rmtree(folder)
            for parent in list(folder.parents)[:2]:  # runs/NAME, where this was the first of its name
                if parent != Path.cwd() and parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        raise


def _folder(trainer: pl.Trainer) -> Path | None:
    """Return the folder of one version of a run, which no other run shares; None where logs go elsewhere."""
    logger = trainer.logger
    if logger is None or getattr(logger, "version", None) is None or "://" in str(getattr(logger, "log_dir", "")):
        return None
    folder = getattr(logger, "log_dir", None)
    return Path(folder) if folder else None


def _has_settings_alone(folder: Path) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return folder.is_dir() and all(path.name in _OF_NO_RESULT or path.stat().st_size == 0 for path in files)
