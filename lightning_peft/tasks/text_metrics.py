"""``TextMetrics``: ROUGE and BLEU of generated texts."""

from __future__ import annotations

import importlib

from torch import Tensor, nn


class TextMetrics(nn.Module):
    """ROUGE-1, ROUGE-2 and ROUGE-L (F-measures without stemming) and sacreBLEU, of torchmetrics, from 0 to 1.

    ROUGE-Lsum and stemming would need nltk, and the former a download as well.
    """

    def __init__(self) -> None:
        super().__init__()
        text = importlib.import_module("torchmetrics.text")  # heavy, so on first use
        self.rouge = text.ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL"))
        self.bleu = text.SacreBLEUScore()
        self.rows = 0

    def update(self, texts: list[str], references: list[str]) -> None:
        """Add texts.

        Args:
            texts: What was generated.
            references: What was to be written, for each text.
        """
        targets = [[reference] for reference in references]
        self.rouge.update(texts, targets)
        self.bleu.update(texts, targets)
        self.rows += len(texts)

    def results(self, prefix: str) -> dict[str, Tensor]:
        """The scores of all texts since the last call, empty if there were none.

        Args:
            prefix: Of their names.
        """
        if not self.rows:
            return {}
        scores = {name.removesuffix("_fmeasure"): value for name, value in self.rouge.compute().items()}
        found = {name: value for name, value in scores.items() if name in self.rouge.rouge_keys}
        found["bleu"] = self.bleu.compute()
        self.rouge.reset()
        self.bleu.reset()
        self.rows = 0
        return {f"{prefix}{name}": value for name, value in found.items()}
