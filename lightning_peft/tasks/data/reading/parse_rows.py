"""``parse_rows`` reads CSV, TSV, JSON, JSONL and text files row by row and strictly: what is odd is refused by its row.

The library that keeps rows on disk for us reads such files, too, but changes values without a word: texts that look
like dates or numbers become such, whole numbers become floats, values that no column name stands over are dropped.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

from lightning_peft.tasks.data.reading.read_conll import read_conll
from lightning_peft.tasks.messages import quoted

Row = dict[str, Any]

PARSED = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".conll")
_LONGEST_FIELD = 2**31 - 1  # of a CSV file; the module's own limit is 131,072 characters


def parse_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield each row with its number: the line it starts on, or its position in the list of a JSON file, from 1 on.

    Args:
        path: The file, in UTF-8; with .gz after the suffix it is compressed. CSV and TSV files start with a line of
            column names; TSV has no quoting. JSONL has one object a line; JSON the same, or one list of objects, which
            alone is read as a whole. Text has one row a line, in column ``text``; blank lines are left out.

    Raises:
        ValueError: If any part of it cannot be read.
    """
    kind = suffix(path)
    newline = "" if kind in (".csv", ".tsv") else None  # quoted fields keep their line ends
    opened: Callable[..., TextIO] = gzip.open if _is_packed(path) else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield from _PARSERS[kind](path, file)
    except UnicodeDecodeError as error:
        raise ValueError(_no_utf8(path)) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} is not a whole gzip file ({error}). "
            "Compress it again, or drop .gz from the name of a plain file."
        ) from error


def suffix(path: Path) -> str:
    """The suffix that says what a file is, in lower case, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _is_packed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _no_utf8(path: Path) -> str:
    """Return the sentence about a file that is not UTF-8; it is read again, since decoding has lost count of lines."""
    opened: Callable[..., Any] = gzip.open if _is_packed(path) else open
    with opened(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(b"\x1f\x8b"):
                return f"{str(path)!r} is compressed by gzip. Name it {path.name + '.gz'!r}."
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{str(path)!r} is not UTF-8: line {number} has the byte 0x{line[error.start]:02x}. "
                    "Save it as UTF-8, for example with: iconv -f latin1 -t utf-8."
                )
    return f"{str(path)!r} is not UTF-8. Save it as UTF-8."


def _read_delimited(path: Path, file: TextIO, delimiter: str, quoting: Literal[0, 3]) -> Iterator[tuple[int, Row]]:
    limit = csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
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
    finally:
        csv.field_size_limit(limit)


def _header(path: Path, names: list[str]) -> list[str]:
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice:
        raise ValueError(f"{str(path)!r} has the column {twice[0]!r} twice. Give each column its own name.")
    return names


def _read_lines(path: Path, file: TextIO) -> Iterator[tuple[int, Row]]:
    return ((number, {"text": line.rstrip("\n")}) for number, line in enumerate(file, start=1) if line.strip())


def _read_jsonl(path: Path, file: TextIO) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _object(path, number, _parse(path, number, line.rstrip("\n")))


def _read_json(path: Path, file: TextIO) -> Iterator[tuple[int, Row]]:
    is_list = next((line for line in file if line.strip()), "[").lstrip().startswith("[")
    file.seek(0)
    if not is_list:
        yield from _read_jsonl(path, file)
        return
    text = file.read()
    values: Any = _parse(path, 1, text) if text.strip() else []
    for number, value in enumerate(values, start=1):
        yield number, _object(path, number, value)


class _RepeatedKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return found


_decode = json.JSONDecoder(object_pairs_hook=_unique).decode


def _parse(path: Path, line: int, text: str) -> object:
    try:
        value: object = _decode(text)
        return value
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not valid JSON in line {line + error.lineno - 1}, column {error.colno}: {error.msg}. "
            "A .jsonl file has one object a line, a .json file the same or one list of objects."
        ) from error
    except _RepeatedKeyError as error:
        at = f"in row {line}" if suffix(path) == ".jsonl" else "in one object"
        raise ValueError(f"{str(path)!r} has the key {str(error)!r} twice {at}. Keep one of them.") from None


def _object(path: Path, number: int, value: object) -> Row:
    if not isinstance(value, dict):
        raise ValueError(
            f"{str(path)!r} holds a {type(value).__name__} in row {number}, expected an object such as "
            '{"text": "...", "label": "..."}. A file that is one list is to be named .json.'
        )
    return value


_PARSERS: dict[str, Callable[[Path, TextIO], Iterator[tuple[int, Row]]]] = {
    ".csv": partial(_read_delimited, delimiter=",", quoting=csv.QUOTE_MINIMAL),
    ".tsv": partial(_read_delimited, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".txt": _read_lines,
    ".conll": read_conll,
}
