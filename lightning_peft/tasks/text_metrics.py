"""``TextMetrics``: ROUGE and BLEU of generated texts; ``Perplexity`` of their tokens."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric

_KEYS = ("rouge1", "rouge2", "rougeL")


class TextMetrics(nn.Module):
    """ROUGE-1, ROUGE-2 and ROUGE-L (F-measures) and sacreBLEU, as torchmetrics computes them, from 0 to 1.

    ROUGE counts words of the letters a to z and digits, as its authors' program does, without stemming. Stemming and
    ROUGE-Lsum would need nltk, and the latter a download as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rouge = nn.ModuleDict({key: MeanMetric() for key in _KEYS})  # a mean is two numbers, whatever the rows
        self.bleu = importlib.import_module("torchmetrics.text").SacreBLEUScore()
        self.rows = 0

    def update(self, texts: list[str], references: list[str]) -> None:
        """Add texts.

        Args:
            texts: What was generated.
            references: What was to be written, for each text.
        """
        targets = [[reference] for reference in references]
        functional = importlib.import_module("torchmetrics.functional.text")
        scores = functional.rouge_score(texts, targets, rouge_keys=_KEYS)
        rouge: Any = self.rouge
        for key, metric in rouge.items():
            metric.update(scores[f"{key}_fmeasure"], len(texts))
        self.bleu.update(texts, targets)
        self.rows += len(texts)

    def results(self, prefix: str) -> dict[str, Tensor]:
        """The scores of all texts since the last call, empty if there were none.

        Args:
            prefix: Of their names.
        """
        metrics: dict[str, Any] = {**dict(self.rouge.items()), "bleu": self.bleu}
        found = {f"{prefix}{name}": metric.compute() for name, metric in metrics.items()} if self.rows else {}
        for metric in metrics.values():
            metric.reset()
        self.rows = 0
        return found


class Perplexity(MeanMetric):
    """exp of the mean loss per token, over all batches."""

    def compute(self) -> Tensor:
        """The perplexity so far."""
        mean: Tensor = super().compute()
        return mean.exp()
