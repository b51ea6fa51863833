"""What a column of labels means: one class a row, several, or a score; each is read, encoded and made a tensor."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_peft.tasks.data.class_labels import (
    Classes,
    class_indices,
    is_label,
    label_texts,
    label_values,
    sorted_classes,
)
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.messages import quoted

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]  # as transformers has

_TO_SCORES = "For scores set problem_type: regression in the data and num_classes: 1 in TextClassification."
_TO_SEVERAL = (
    "For several labels a row set problem_type: multi_label_classification in the data and multi_label: true in "
    "TextClassification."
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


class Labels(ABC):
    """How labels are read from a column of a table and come into a batch."""

    @abstractmethod
    def classes(self, table: Table, column: str) -> Classes | None:
        """The different labels of the train file, in order; None where labels are no classes."""

    @abstractmethod
    def encode(self, table: Table, column: str, classes: Classes | None) -> list[Any]:
        """What an example has as its label."""

    @abstractmethod
    def tensor(self, labels: list[Any]) -> Tensor:
        """The labels of a batch of examples."""


class ClassLabels(Labels):
    """One class in each row: batches hold its number, (rows,)."""

    def classes(self, table: Table, column: str) -> Classes:
        names = self._read(table, column)
        if all(map(_NUMBER.fullmatch, names)) and not all(name.lstrip("+-").isdecimal() for name in names):
            raise ValueError(
                f"Column {column!r} of {table.source!r} holds decimal numbers, such as {quoted(names, 3)}, expected "
                f"classes. {_TO_SCORES} For classes write whole numbers or names."
            )
        return sorted_classes(names)

    def encode(self, table: Table, column: str, classes: Classes | None) -> list[int]:
        labels = self._read(table, column)
        return [index for (index,) in class_indices(table, ([label] for label in labels), classes or [])]

    def tensor(self, labels: list[Any]) -> Tensor:
        return torch.tensor(labels)

    def _read(self, table: Table, column: str) -> list[str]:
        values = label_values(table, column)
        hints = {float: f" {_TO_SCORES}", list: f" {_TO_SEVERAL}"}
        hint = next((hints[type(value)] for value in values if type(value) in hints), "")
        return label_texts(table, column, values, hint)


class ScoreLabels(Labels):
    """A number in each row: batches hold it as it is, (rows,)."""

    def classes(self, table: Table, column: str) -> None:
        return None

    def encode(self, table: Table, column: str, classes: Classes | None) -> list[float]:
        scores = [_score(value) for value in table.values(column)]
        table.refuse(
            [i for i, score in enumerate(scores) if score is None],
            f"Column {column!r} of {table.source!r} holds no finite number in {{rows}}. Regression needs one in every "
            "row, such as 0.5; for classes set problem_type: single_label_classification in the data.",
        )
        return [score for score in scores if score is not None]

    def tensor(self, labels: list[Any]) -> Tensor:
        return torch.tensor(labels, dtype=torch.float32)


@dataclass(frozen=True)
class SeveralLabels(Labels):
    """Any number of classes in each row: batches hold 1 for each class of a row and 0 for others, (rows, classes).

    Args:
        separator: What stands between the labels of a row that is text; None expects lists.
    """

    separator: str | None = None

    def classes(self, table: Table, column: str) -> Classes:
        rows = self._read(table, column)
        names = {label for labels in rows for label in labels}
        if len(names) < 2:
            raise ValueError(
                f"Column {column!r} of {table.source!r} has the labels {quoted(sorted(names))}, expected two or more "
                "different ones, of which a row may have any number."
            )
        if self.separator is not None and max(map(len, rows)) == 1:
            rank_zero_warn(
                f"No row of {table.source!r} has more than one label. If labels such as {quoted(sorted(names), 3)} are "
                f"several, set label_separator to what stands between them; it is {self.separator!r}."
            )
        return sorted_classes(names)

    def encode(self, table: Table, column: str, classes: Classes | None) -> list[list[bool]]:
        names = classes or []
        rows = class_indices(table, self._read(table, column), names)
        return [[index in indices for index in range(len(names))] for indices in map(set, rows)]

    def tensor(self, labels: list[Any]) -> Tensor:
        return torch.tensor(labels, dtype=torch.float32)

    def _read(self, table: Table, column: str) -> list[list[str]]:
        rows = [self._split(value) for value in label_values(table, column)]
        table.refuse(
            [i for i, labels in enumerate(rows) if not isinstance(labels, list) or not all(map(is_label, labels))],
            f"Column {column!r} of {table.source!r} holds no list of labels in {{rows}}. Give lists of names or whole "
            "numbers in JSON, where [] is a row without any; of a table of text, set label_separator in the data to "
            'what stands between labels, such as ",".',
        )
        return [list(dict.fromkeys(map(str, labels))) for labels in rows]

    def _split(self, value: Any) -> Any:
        if value is None or value == "":
            return []
        if isinstance(value, str) and self.separator is not None and not value.startswith("["):
            return [label.strip() for label in value.split(self.separator)] if value.strip() else []
        return value


def labels_of(problem_type: ProblemType, separator: str | None) -> Labels:
    """How labels of a type of problem are read.

    Args:
        problem_type: As transformers names it.
        separator: What stands between the labels of a row that is text, where rows may have several.

    Raises:
        ValueError: If there is no such type, or it has no separator.
    """
    kinds: dict[str, Labels] = {
        "single_label_classification": ClassLabels(),
        "multi_label_classification": SeveralLabels(separator),
        "regression": ScoreLabels(),
    }
    if problem_type not in kinds:
        raise ValueError(f"Got problem_type={problem_type!r}, expected one of {', '.join(kinds)}.")
    if separator is not None and (separator == "" or problem_type != "multi_label_classification"):
        raise ValueError(
            f"Got label_separator={separator!r} and problem_type={problem_type!r}. Labels of a row are separated, by "
            "one character or more, where problem_type is multi_label_classification."
        )
    return kinds[problem_type]


def _score(value: Any) -> float | None:
    """Return a number, or None for anything else."""
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value.strip()) else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
