"""``TestRows``: a Callback that counts the classes of test rows and shows what is predicted for the first of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.overrides import is_overridden

_SHOWN = 3
_WIDTH = 200  # characters of a text
_Z = 1.96  # of a normal distribution, for 95 %


class TestRows(pl.Callback):
    """Watches the test that follows a fit, where each row has one class and the module knows their names.

    Of several processes each would see a part of the rows, so that nothing is said.
    """

    __test__ = False  # for pytest, a class to collect

    def __init__(self) -> None:
        self.counts = torch.zeros(0, dtype=torch.long)
        self.first: list[dict[str, Any]] = []

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Count the classes of a batch; predict the first rows."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        names = getattr(pl_module, "class_names", None)
        if not isinstance(labels, torch.Tensor) or labels.dim() != 1 or labels.is_floating_point() or not names:
            return
        if trainer.world_size > 1 or hasattr(getattr(trainer, "datamodule", None), "tasks"):
            return
        if not len(self.counts):
            self.counts = torch.zeros(len(names), dtype=torch.long)
            self.first = _predicted(pl_module, batch, names)
        self.counts += labels.cpu().bincount(minlength=len(names))

    def accuracy(self, share: float) -> str:
        """Return the share of right answers with its margin, and what the most frequent class alone would reach."""
        rows = int(self.counts.sum())
        if not rows:
            return f"{share:.1%}".replace("%", " %")
        low, high = (f"{100 * bound:.1f}" for bound in wilson(share, rows))
        guess = f"{100 * int(self.counts.max()) / rows:.1f} %"
        return f"{100 * share:.1f} % of {rows} rows (95 % interval {low} to {high}); the most frequent class: {guess}"

    def examples(self, data: Any) -> list[str]:
        """Return a line for each of the first rows, with its text where the data has it."""
        if not self.first or not (hasattr(data, "splits") and hasattr(data, "columns")):
            return []
        table = data.splits.rows("test")
        texts = [
            " / ".join(row) for row in zip(*(table.texts(column)[:_SHOWN] for column in data.columns), strict=True)
        ]
        width = max(len(row["predicted"]) for row in self.first)
        return [
            f"{row['predicted']:<{width}}  {row['probability']:4.0%}  "
            f"{'right' if row['predicted'] == row['label'] else 'wrong: ' + row['label']:<6} "
            f"{text if len(text) <= _WIDTH else text[: _WIDTH - 3] + '...'}"
            for row, text in zip(self.first, texts, strict=False)
        ]


def wilson(share: float, rows: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of rows."""
    center = (share + _Z**2 / (2 * rows)) / (1 + _Z**2 / rows)
    half = _Z * math.sqrt(share * (1 - share) / rows + _Z**2 / (4 * rows**2)) / (1 + _Z**2 / rows)
    return max(0.0, center - half), min(1.0, center + half)


def _predicted(module: Any, batch: Mapping[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Return what a module predicts for the first rows of a batch, beside their labels."""
    if not is_overridden("predict_step", module, pl.LightningModule):
        return []
    module.on_predict_start()
    rows = {name: value[:_SHOWN] for name, value in batch.items()}
    prediction = module.predict_step(rows, 0)
    if not isinstance(prediction, dict) or not {"labels", "probabilities"} <= prediction.keys():
        return []
    best = prediction["probabilities"].max(dim=-1).values.tolist()
    labels = [names[number] for number in rows["labels"].tolist()]
    columns = zip(prediction["labels"], best, labels, strict=True)
    return [{"predicted": str(name), "probability": share, "label": label} for name, share, label in columns]
