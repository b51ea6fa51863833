"""Classes in a column of a table: their names, their order and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.messages import quoted

Classes = list[str] | list[int]


def read_labels(table: Table, column: str) -> list[str]:
    """The labels of a table as text.

    Args:
        table: Its rows.
        column: Of strings or whole numbers.

    Raises:
        ValueError: If a row has none.
    """
    return label_texts(table, column, table.values(column))


def label_texts(table: Table, column: str, values: list[Any], hint: str = "") -> list[str]:
    """Values as text.

    Args:
        table: Where they come from, as errors name it.
        column: The same.
        values: Strings or whole numbers.
        hint: What to do about others.

    Raises:
        ValueError: If one is neither.
    """
    table.refuse(
        [i for i, value in enumerate(values) if not is_label(value)],
        f"Column {column!r} of {table.source!r} holds no string or whole number in {{rows}}. Give every row a label."
        f"{hint}",
    )
    return [str(value) for value in values]


def label_values(table: Table, column: str) -> list[Any]:
    """A column of labels, or of lists of them; numbers that stand for names (``ClassLabel``) become these names."""
    names = declared_names(table, column)

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(entry) for entry in value]
        return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else None

    values = table.values(column)
    return values if names is None else [named(value) for value in values]


def declared_names(table: Table, column: str) -> list[str] | None:
    """The names that a data set declares for the numbers of a column (``ClassLabel``), in order; None without any."""
    feature = (table.dataset.features or {}).get(column)
    return getattr(getattr(feature, "feature", feature), "names", None)


def class_indices(table: Table, rows: Iterable[Sequence[str]], classes: Classes) -> list[list[int]]:
    """The numbers of the classes in each row.

    Args:
        table: Where they come from, as errors name it.
        rows: The labels of each row.
        classes: All of them, in order.

    Raises:
        ValueError: If a label is no class.
    """
    index, found = {str(name): position for position, name in enumerate(classes)}, []
    for position, labels in enumerate(rows):
        unknown = [label for label in labels if label not in index]
        if unknown:
            raise ValueError(
                f"Row {table.numbers[position]} of {table.source!r} has the label {unknown[0]!r}, which the train "
                f"file does not have. Known labels: {quoted(index)}. Correct the row, or add such rows to the train "
                "file."
            )
        found.append([index[label] for label in labels])
    return found


def sorted_classes(labels: Iterable[str]) -> Classes:
    """Whole numbers in order if all labels are, else strings in order: the same for a CSV and a JSONL file."""
    names = set(labels)
    if all(name.removeprefix("-").isdecimal() and str(int(name)) == name for name in names):
        return sorted(map(int, names))
    return sorted(names)


def is_label(value: Any) -> bool:
    """Whether a value is a string or a whole number."""
    return isinstance(value, (str, int)) and bool(str(value).strip())
