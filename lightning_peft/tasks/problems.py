"""The problems that a text classifier can solve: one class for each text, several, or a score."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torchmetrics import MeanSquaredError, Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelExactMatch,
    MultilabelF1Score,
)

from lightning_peft.tasks.data.labels import ProblemType

Names = Sequence[str] | Sequence[int]


class Problem(ABC):
    """Loss, metrics and prediction of one problem; ``logits`` are of shape (rows, outputs), in float32."""

    problem_type: ProblemType
    accuracy: str | None  # which metric is the share of right answers

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """The metrics, which are updated with `measured`."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over rows."""

    @abstractmethod
    def measured(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments of the metrics, each with one entry for each row."""

    @abstractmethod
    def predict(self, logits: Tensor, names: Names) -> dict[str, Any]:
        """Columns of a prediction, each with one entry for each row."""

    @abstractmethod
    def sample_labels(self, rows: int) -> Tensor:
        """Labels of the shape and type that batches have."""


@dataclass(frozen=True)
class SingleLabel(Problem):
    """One class for each text, by cross entropy.

    Args:
        classes: Their number.
    """

    classes: int
    problem_type = "single_label_classification"
    accuracy = "accuracy"

    def metrics(self) -> MetricCollection:
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(self.classes, average="micro"),
            "macro_f1": MulticlassF1Score(self.classes, average="macro"),
        }
        return MetricCollection(metrics)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    def measured(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits, labels

    def predict(self, logits: Tensor, names: Names) -> dict[str, Any]:
        """The most likely class of each text, and the probabilities of all classes."""
        probabilities = logits.softmax(dim=-1)
        return {"labels": [names[i] for i in probabilities.argmax(dim=-1).tolist()], "probabilities": probabilities}

    def sample_labels(self, rows: int) -> Tensor:
        return torch.zeros(rows, dtype=torch.long)


@dataclass(frozen=True)
class MultiLabel(Problem):
    """Any number of classes for each text, by binary cross entropy, the mean over rows and classes.

    Args:
        classes: Their number.
        threshold: Probability above which a class is predicted.
    """

    classes: int
    threshold: float
    problem_type = "multi_label_classification"
    accuracy = "exact_match"

    def metrics(self) -> MetricCollection:
        """F1 over all decisions and over classes, and the share of rows whose labels are all right and complete."""
        metrics: dict[str, Metric | MetricCollection] = {
            "micro_f1": MultilabelF1Score(self.classes, self.threshold, average="micro"),
            "macro_f1": MultilabelF1Score(self.classes, self.threshold, average="macro"),
            "exact_match": MultilabelExactMatch(self.classes, self.threshold),
        }
        return MetricCollection(metrics)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def measured(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sigmoid(), labels.long()  # of logits between 0 and 1, metrics would take no sigmoid

    def predict(self, logits: Tensor, names: Names) -> dict[str, Any]:
        """The classes of each text whose probability is above the threshold, and the probabilities of all classes."""
        probabilities = logits.sigmoid()
        chosen = (probabilities > self.threshold).tolist()
        labels = [[name for name, is_chosen in zip(names, row, strict=True) if is_chosen] for row in chosen]
        return {"labels": labels, "probabilities": probabilities}

    def sample_labels(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.classes)


@dataclass(frozen=True)
class Regression(Problem):
    """A score for each text, by the squared error."""

    problem_type = "regression"
    accuracy = None

    def metrics(self) -> MetricCollection:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*will save all targets and predictions")  # two numbers a row
            metrics: dict[str, Metric | MetricCollection] = {
                "mse": MeanSquaredError(),
                "pearson": PearsonCorrCoef(),
                "spearman": SpearmanCorrCoef(),
            }
        return MetricCollection(metrics)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return mse_loss(*self.measured(logits, labels))

    def measured(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.squeeze(-1), labels.to(logits.dtype)

    def predict(self, logits: Tensor, names: Names) -> dict[str, Any]:
        """The score of each text."""
        return {"scores": logits.squeeze(-1)}

    def sample_labels(self, rows: int) -> Tensor:
        return torch.zeros(rows)


def problem_of(num_classes: int, multi_label: bool, threshold: float) -> Problem:
    """The problem that settings of a classifier mean.

    Args:
        num_classes: Number of classes; 1 for a score.
        multi_label: Whether a text may have any number of them.
        threshold: Probability above which a text has a class, where it may have several.

    Raises:
        ValueError: If they do not belong together.
    """
    if num_classes < 1 or (multi_label and num_classes == 1):
        expected = "2 or more for several labels a text" if multi_label else "2 or more for classes, or 1 for a score"
        raise ValueError(f"Got num_classes={num_classes}, expected {expected}: the number of labels of the data.")
    if not 0 < threshold < 1:
        raise ValueError(f"Got threshold={threshold}, expected a probability between 0 and 1, such as 0.5.")
    if threshold != 0.5 and not multi_label:
        raise ValueError(f"Got threshold={threshold}, which only multi_label=True asks for. Set that, or leave it out.")
    if multi_label:
        return MultiLabel(num_classes, threshold)
    return Regression() if num_classes == 1 else SingleLabel(num_classes)
