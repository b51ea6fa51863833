"""``write_rows`` writes the rows of files, as they stand there, into a file that can be mapped into memory."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lightning_peft.tasks.data.reading.parse_rows import Row, parse_rows, suffix
from lightning_peft.tasks.data.reading.row_cache import write_batches
from lightning_peft.tasks.messages import quoted

FORMAT = 1  # of what is written; another number leaves what earlier versions wrote alone
WRITTEN = "written.json"  # beside the rows: how many each file has, and the names of columns that hold JSON
_ROWS = 1000  # at a time

Item = TypeVar("Item")


def write_rows(paths: Sequence[Path], folder: Path) -> None:
    """Write ``rows.arrow``, and beside it how many rows each file has and which columns hold values as JSON.

    Columns of text files that hold nothing but text stay text, and all others become JSON, which holds anything: any
    type in each row, numbers of any size, nested lists. Parquet and arrow files have types already, which they keep.

    Args:
        paths: The files, all of one kind.
        folder: Where to write.

    Raises:
        ValueError: If any part of them cannot be read, or columns have other types in one file than in another.
    """
    pyarrow = importlib.import_module("pyarrow")
    columns = {} if suffix(paths[0]) in _TYPED else _columns(paths)
    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    json_names = {name for name, is_json in columns.items() if is_json}
    rows = dict.fromkeys(paths, 0)

    def batches() -> Iterator[Any]:
        for path in paths:
            for batch in _batches(path, schema, json_names):
                rows[path] += batch.num_rows
                yield batch

    if not write_batches(folder, batches(), quoted(map(str, paths), 1)):
        write_batches(folder, [pyarrow.RecordBatch.from_pylist([], schema=schema)], "")
    (folder / WRITTEN).write_text(json.dumps({"rows": list(rows.values()), "json_columns": sorted(json_names)}))


def in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield so many items at a time.

    Args:
        items: Any.
        size: Of each part but the last.
    """
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def column_texts(rows: list[Row], name: str, is_json: bool) -> list[str | None]:
    """One column as it is stored.

    Args:
        rows: The rows; what one lacks is None.
        name: Of the column.
        is_json: Whether its values are written as JSON.
    """
    values = [row.get(name) for row in rows]
    return [None if value is None else json.dumps(value) for value in values] if is_json else values


def json_columns(rows: Iterable[Row]) -> dict[str, bool]:
    """Return, of each column, whether it holds anything else than text.

    Args:
        rows: All rows.
    """
    found: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            found[name] = found.get(name, False) or not (value is None or isinstance(value, str))
    return found


def check_surrogates(path: Path, rows: Iterable[tuple[int, Row]]) -> None:
    """Refuse text that no file can hold.

    Args:
        path: Whose rows they are.
        rows: With their numbers.

    Raises:
        ValueError: If a row has such text.
    """
    for number, row in rows:
        for name, value in row.items():
            try:
                (value if isinstance(value, str) else "").encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"Column {name!r} of {str(path)!r} has half of a surrogate pair in row {number}, which is no "
                    "character. Correct the text there; what cut it may have counted UTF-16 units."
                ) from None


def _columns(paths: Sequence[Path]) -> dict[str, bool]:
    """Return the names of all columns, and whether JSON has to hold them."""
    found: dict[str, bool] = {}
    for path in paths:
        rows = (row for _, row in parse_rows(path))
        only_text = suffix(path) in (".csv", ".tsv", ".txt")  # with the same columns in each row
        for name, is_json in json_columns(islice(rows, 1) if only_text else rows).items():
            found[name] = found.get(name, False) or is_json
    return found


def _batches(path: Path, schema: Any, json_names: set[str]) -> Iterator[Any]:
    """Yield record batches of one file."""
    if suffix(path) in _TYPED:
        yield from typed_batches(path)
    else:
        yield from (_parsed_batch(path, part, schema, json_names) for part in in_parts(parse_rows(path), _ROWS))


def typed_batches(path: Path) -> Iterator[Any]:
    """Yield the record batches of a parquet or arrow file.

    Args:
        path: The file.

    Raises:
        ValueError: If it cannot be read.
    """
    pyarrow = importlib.import_module("pyarrow")
    try:
        yield from _TYPED[suffix(path)](path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{str(path)!r} is no whole {suffix(path)} file ({reason}). Write it again, or name it after what it is."
        ) from error


def _parsed_batch(path: Path, numbered: list[tuple[int, Row]], schema: Any, json_names: set[str]) -> Any:
    pyarrow = importlib.import_module("pyarrow")
    rows = [row for _, row in numbered]
    try:
        columns = [pyarrow.array(column_texts(rows, n, n in json_names), pyarrow.string()) for n in schema.names]
    except UnicodeEncodeError:
        check_surrogates(path, numbered)
        raise
    return pyarrow.record_batch(columns, schema=schema)


def _parquet_batches(path: Path) -> Iterator[Any]:
    yield from importlib.import_module("pyarrow.parquet").ParquetFile(str(path)).iter_batches(_ROWS)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Yield the batches of either of the two formats that are named so."""
    pyarrow = importlib.import_module("pyarrow")
    source = pyarrow.memory_map(str(path))
    try:
        yield from pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        file = pyarrow.ipc.open_file(source)
        yield from (file.get_batch(index) for index in range(file.num_record_batches))


_TYPED: dict[str, Callable[[Path], Iterator[Any]]] = {".parquet": _parquet_batches, ".arrow": _arrow_batches}
