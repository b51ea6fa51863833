"""``read_conll`` reads sentences from CoNLL files: a token and its tag a line, a blank line between sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_DOCUMENT = "-DOCSTART-"  # stands in place of a sentence where a document begins


def read_conll(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each sentence as columns ``tokens`` and ``tags``, with the number of its first line.

    The first column of a line is the token and the last its tag; one column alone has tokens without tags.

    Args:
        path: The file, as errors name it.
        lines: Its lines, whose columns are separated by tabs, or by spaces where a line has no tab.

    Raises:
        ValueError: If a line has another number of columns than the first.
    """
    start, width, sentence = 0, 0, list[list[str]]()
    for number, line in enumerate(lines, start=1):
        columns = _columns(line)
        if not columns or columns[0] == _DOCUMENT:
            if sentence:
                yield start, _row(sentence)
            sentence = []
            continue
        width = width or len(columns)
        if len(columns) != width or not all(columns):
            empty = f", {columns.count('')} of them empty" if "" in columns else ""
            raise ValueError(
                f"{str(path)!r} has {len(columns)} columns in row {number}{empty}, expected {width} as in its first "
                "line: a token, a tab or spaces, and its tag, with a blank line after each sentence."
            )
        start = start if sentence else number
        sentence.append(columns)
    if sentence:
        yield start, _row(sentence)


def _columns(line: str) -> list[str]:
    if not line.strip():
        return []
    if "\t" in line:
        return [column.strip(" ") for column in line.rstrip("\r\n").split("\t")]
    return [column for column in line.strip(" \r\n").split(" ") if column]


def _row(sentence: list[list[str]]) -> dict[str, Any]:
    row = {"tokens": [columns[0] for columns in sentence]}
    return row if len(sentence[0]) == 1 else {**row, "tags": [columns[-1] for columns in sentence]}
