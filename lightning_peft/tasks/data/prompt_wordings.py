"""Checks and parses the wordings of a task: prompts and answers as plain text with fields."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_peft.methods.prompting.template import Template
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.messages import did_you_mean, quoted


def plain_template(text: str, max_length: int | None = None, shorten: str | None = None) -> Template:
    """A template without pseudo tokens and masks.

    Args:
        text: With {column} fields.
        max_length: Longest row in tokens.
        shorten: The field whose end is cut off where a row is longer.

    Raises:
        ValueError: It has some, or no text.
    """
    template = Template(text, max_length, shorten)
    if template.masks or template.pseudo_tokens:
        raise ValueError(f"{text!r} has a mask or pseudo tokens, expected plain text with {{column}} fields.")
    if not text.strip():
        raise ValueError("Got an empty text among templates or answers. Give each some words.")
    return template


def texts_by_label(answers: dict[str, str]) -> dict[str, str]:
    """The answers, each label as text.

    Args:
        answers: By label, which may be a whole number.
    """
    return {str(label): text for label, text in answers.items()}


def check_wordings(
    templates: dict[str, str], answers: dict[str, str] | None, others: dict[str, dict[str, str]], evaluated: str | None
) -> None:
    """Refuse wordings that do not belong together.

    Args:
        templates: By name.
        answers: By label; None where each row has its own.
        others: Answers by label that some of the templates have instead, by name.
        evaluated: Name of the one that evaluates; None for the first.

    Raises:
        ValueError: Says what is missing or unknown.
    """
    if not templates:
        raise ValueError(
            "Got no templates, expected one wording or more by name, such as asked: '{text} Good or bad?'."
        )
    if answers is None:
        if others:
            raise ValueError(
                f"Got other_answers for {quoted(others)} and choices, whose texts are in each row. Remove one."
            )
        answers = {"0": "", "1": ""}  # of which there are enough
    if len(answers) < 2:
        raise ValueError(f"Got answers for {quoted(answers)}, expected two labels or more to choose from.")
    for name in [*others, *([] if evaluated is None else [evaluated])]:
        if name not in templates:
            known = f"templates: {quoted(templates)}.{did_you_mean(name, templates)}"
            raise ValueError(f"{name!r} is the name of no template. Names of {known}")
    for name, own in others.items():
        if set(own) != set(answers):
            raise ValueError(
                f"other_answers of {name!r} are for the labels {quoted(own)}, expected those of answers: "
                f"{quoted(answers)}."
            )


def columns_of(table: Table, fields: list[str], blank: bool = False) -> list[dict[str, str]]:
    """The fields of each row.

    Args:
        table: The rows.
        fields: Names of columns.
        blank: Whether a field may be empty.
    """
    columns = [table.texts(field, blank=blank) for field in fields]
    return [dict(zip(fields, values, strict=True)) for values in zip(*columns, strict=True)] or [{}] * len(table)


def fill(answer: Template, fields: Mapping[str, str]) -> str:
    """The text of an answer; empty if all of its fields are.

    Args:
        answer: Plain, with fields.
        fields: Their texts.
    """
    if fields and not any(text.strip() for text in fields.values()):
        return ""
    return "".join(fields[piece.value] if piece.kind == "field" else piece.value for piece in answer.pieces)
