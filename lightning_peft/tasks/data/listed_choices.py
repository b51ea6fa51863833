"""Choices that each row lists, with the label of the right one."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.messages import quoted

TEXTS = "texts"  # of a batch's entry: the choices as each row lists them


class Listed(NamedTuple):
    """The choices of one row: their texts, and their names where the row has some."""

    texts: list[str]
    names: list[str] | None


def read_choices(table: Table, column: str) -> list[Listed]:
    """The choices of each row.

    Args:
        table: The rows.
        column: Of lists of texts, or of ``{"text": [...], "label": [...]}``.

    Raises:
        ValueError: Rows have something else, or fewer than two choices.
    """
    rows = [_listed(value) for value in table.values(column)]
    table.refuse(
        [index for index, row in enumerate(rows) if row is None],
        f"Column {column!r} of {table.source!r} holds no list of texts in {{rows}}. Give each row a list such as "
        '["yes", "no"].',
    )
    found = [row for row in rows if row is not None]
    table.refuse(
        [index for index, row in enumerate(found) if len(row.texts) < 2 or not all(map(str.strip, row.texts))],
        f"Column {column!r} of {table.source!r} holds fewer than two choices, or one without text, in {{rows}}. Fill "
        "or remove these rows.",
    )
    return found


def gold_of(table: Table, column: str, rows: list[Listed]) -> list[int]:
    """The number of the right choice in each row.

    Args:
        table: The rows.
        column: Of numbers from 0 on (also as text), of the right choice's text, or of its name.
        rows: Their choices.

    Raises:
        ValueError: A label means no choice, or more than one.
    """
    values = table.values(column)
    meant = [_meant(value, row) for value, row in zip(values, rows, strict=True)]
    none = [index for index, numbers in enumerate(meant) if not numbers]
    several = [index for index, numbers in enumerate(meant) if len(numbers) > 1]
    wrong = (none or several or [0])[0]
    example = f"such as {values[wrong]!r} for the choices {quoted(rows[wrong].texts)}"
    accepted = "their text, or their number from 0 on"
    table.refuse(
        none, f"{table.source!r} has a label that is none of the choices in {{rows}}, {example}. Give {accepted}."
    )
    table.refuse(
        several,
        f"{table.source!r} has a label that may mean several of the choices in {{rows}}, {example}. Give the number "
        "from 0 on, not as text.",
    )
    return [min(numbers) for numbers in meant]


def _listed(value: Any) -> Listed | None:
    texts, names = (value.get("text"), value.get("label")) if isinstance(value, dict) else (value, None)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return None
    if names is None:
        return Listed(texts, None)
    return Listed(texts, list(map(str, names))) if isinstance(names, list) and len(names) == len(texts) else None


def _meant(label: Any, row: Listed) -> set[int]:
    """Return the numbers of the choices that a label can mean."""
    numbers = range(len(row.texts))
    if isinstance(label, int) and not isinstance(label, bool) and row.names is None:
        return {label} & set(numbers)
    text = str(label).strip()
    meant = {number for number in numbers if row.texts[number].strip() == text}
    if row.names is not None:
        return meant | {number for number in numbers if row.names[number] == text}
    return meant | ({int(text)} & set(numbers) if text.isdecimal() else set())
