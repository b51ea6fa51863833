"""``read_table`` reads CSV, TSV, JSON and JSONL files, plain or gzipped, or refuses them with the row at fault."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_peft.tasks.messages import close_paths, did_you_mean, quoted, where

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of one file.

    Args:
        path: The file.
        rows: A mapping from column to value for each row; all have the same columns, what a JSON row lacks is None.
        numbers: Where each row is: the line it starts on, or its position in the list of a JSON file. Both start at 1.
    """

    path: Path
    rows: list[Row]
    numbers: list[int]

    def take(self, indices: Sequence[int]) -> Table:
        """Some of the rows."""
        return Table(path=self.path, rows=[self.rows[i] for i in indices], numbers=[self.numbers[i] for i in indices])

    def values(self, column: str) -> list[Any]:
        """One column."""
        if column not in self.rows[0]:
            raise ValueError(
                f"{str(self.path)!r} has no column {column!r}. Its columns: {quoted(self.rows[0])}."
                f"{did_you_mean(column, self.rows[0])} Give the name of one of them."
            )
        return [row[column] for row in self.rows]

    def texts(self, column: str, *, blank: bool = False) -> list[str]:
        """One column of text.

        Args:
            column: Its name.
            blank: Whether a value may be missing or empty; it is then the empty text.
        """
        values = ["" if value is None else value for value in self.values(column)]
        strange = [number for number, value in zip(self.numbers, values, strict=True) if not isinstance(value, str)]
        if strange:
            raise ValueError(
                f"Column {column!r} of {str(self.path)!r} holds something else than text in {where(strange)}."
            )
        empty = [number for number, value in zip(self.numbers, values, strict=True) if not value.strip()]
        if empty and not blank:
            raise ValueError(
                f"Column {column!r} of {str(self.path)!r} is empty in {where(empty)}. Fill or remove what is empty."
            )
        return values


def read_table(name: str) -> Table:
    """The table in a file.

    CSV and TSV files start with a line of column names. TSV has no quoting. JSONL has one object a line, JSON one list
    of objects. All are UTF-8.

    Args:
        name: The file, whose suffix says what it is: .csv, .tsv, .json or .jsonl, and .gz after any of them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If any part of it cannot be read.
    """
    path = Path(name).expanduser()
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in _PARSERS:
        raise ValueError(
            f"{name!r} has the suffix {suffix!r}, expected {', '.join(_PARSERS)}, or one of them with .gz."
        )
    if not path.is_file():
        siblings = (child for child in path.parent.glob("*") if child.is_file())
        raise FileNotFoundError(f"The file {name!r} does not exist. {close_paths(path, siblings)}")
    rows, numbers, empty = [], [], []
    for number, row in _PARSERS[suffix](path, _decode(path)):
        rows.append(row)
        numbers.append(number)
        if not any(value not in ("", None) for value in row.values()):
            empty.append(number)
    if not rows:
        raise ValueError(f"{name!r} holds no rows. Give a file with at least one.")
    if empty:
        raise ValueError(f"{name!r} is empty in {where(empty)}. Remove what is empty.")
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path=path, rows=[{**names, **row} for row in rows], numbers=numbers)


def _decode(path: Path) -> str:
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{str(path)!r} is not a whole gzip file ({error}). "
                "Compress it again, or drop .gz from the name of a plain file."
            ) from error
    try:
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{str(path)!r} is not UTF-8: line {line} has the byte 0x{error.object[error.start]:02x}. "
            "Save it as UTF-8, for example with: iconv -f latin1 -t utf-8."
        ) from error


def _read_delimited(path: Path, text: str, delimiter: str, quoting: Literal[0, 3]) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    names: list[str] = []
    start = 1
    try:
        for fields in reader:
            if not names:
                names = _header(path, fields)
            elif fields and len(fields) != len(names):
                raise ValueError(
                    f"{str(path)!r} has {len(fields)} values in row {start}, expected {len(names)} as in its first "
                    f"line: {quoted(names)}. Put values that contain the separator in double quotes (CSV only)."
                )
            else:
                yield start, dict(zip(names, fields, strict=False))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r} cannot be read from row {start} on: {error}. Look for a double quote that is not closed."
        ) from error


def _header(path: Path, names: list[str]) -> list[str]:
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice:
        raise ValueError(f"{str(path)!r} has the column {twice[0]!r} twice. Give each column its own name.")
    return names


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n") if text else (), start=1):
        yield number, _object(path, number, _parse(path, number, line)) if line.strip() else {}


def _read_json(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    values = _parse(path, 1, text) if text.strip() else []
    if not isinstance(values, list):
        raise ValueError(
            f"{str(path)!r} holds one {type(values).__name__}, expected a list of objects: [{{...}}, ...]."
        )
    for number, value in enumerate(values, start=1):
        yield number, _object(path, number, value)


def _parse(path: Path, line: int, text: str) -> object:
    try:
        value: object = json.loads(text)
        return value
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not valid JSON in line {line + error.lineno - 1}, column {error.colno}: {error.msg}. "
            "A .jsonl file has one object a line, a .json file one list of objects."
        ) from error


def _object(path: Path, number: int, value: object) -> Row:
    if not isinstance(value, dict):
        raise ValueError(
            f"{str(path)!r} holds a {type(value).__name__} in row {number}, expected an object such as "
            '{"text": "...", "label": "..."}. A file that is one list is to be named .json.'
        )
    return value


_PARSERS: dict[str, Callable[[Path, str], Iterator[tuple[int, Row]]]] = {
    ".csv": partial(_read_delimited, delimiter=",", quoting=csv.QUOTE_MINIMAL),
    ".tsv": partial(_read_delimited, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
}
