"""``parse_rows`` reads CSV, TSV, JSON and JSONL files strictly, or refuses them with the row at fault.

The library that reads files for us keeps neither: of a CSV file it drops values that no column name stands over, and
its messages name no row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_peft.tasks.messages import quoted

Row = dict[str, Any]


def parse_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield each row with its number: the line it starts on, or its position in the list of a JSON file, from 1 on.

    Args:
        path: The file, in UTF-8. CSV and TSV files start with a line of column names; TSV has no quoting. JSONL has one
            object a line, JSON one list of objects.

    Raises:
        ValueError: If any part of it cannot be read.
    """
    yield from _PARSERS[_kind(path)](path, _decode(path))


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


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
            elif not fields:
                pass  # a blank line
            elif len(fields) != len(names):
                raise ValueError(
                    f"{str(path)!r} has {len(fields)} values in row {start}, expected {len(names)} as in its first "
                    f"line: {quoted(names)}. Put values that contain the separator in double quotes (CSV only)."
                )
            else:
                yield start, dict(zip(names, fields, strict=True))
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
        if line.strip():
            yield number, _object(path, number, _parse(path, number, line))


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
