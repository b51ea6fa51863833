"""``TableStream`` reads rows as they come, and never all of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lightning_peft.tasks.data.reading.named_sets import open_saved, stream_named
from lightning_peft.tasks.data.reading.parse_rows import PARSED, Row, parse_rows, suffix
from lightning_peft.tasks.data.reading.read_table import BINARY, check_kinds, find_files, is_pattern
from lightning_peft.tasks.data.reading.row_cache import hf_datasets
from lightning_peft.tasks.data.reading.tables import Table, TablePart
from lightning_peft.tasks.data.reading.write_rows import column_texts, json_columns, typed_batches


class StreamedRow(NamedTuple):
    """A row, its file, and its number there as a person counts it."""

    file: str
    number: int
    row: Row


@dataclass(frozen=True)
class TableStream:
    """Rows that are read as they come.

    Args:
        name: What `read_table` reads.
        split: Which of several splits is meant if the name does not say so.
        limit: How many rows to read; None reads all.
    """

    name: str
    split: str = "train"
    limit: int | None = None

    def check(self) -> None:
        """Refuse early what cannot be opened.

        Raises:
            FileNotFoundError: If there is no such file or data set.
            ValueError: If it has no row, or none that can be read.
        """
        if next(iter(self), None) is None:
            raise ValueError(f"{self.name!r} holds no rows. Give a file with at least one.")

    def __iter__(self) -> Iterator[StreamedRow]:
        return islice(self._rows(), self.limit)

    def _rows(self) -> Iterator[StreamedRow]:
        path = Path(self.name).expanduser()
        if path.is_file() or is_pattern(self.name) or suffix(path) in (*PARSED, *BINARY):
            files = find_files(self.name)
            check_kinds(self.name, files)
            for file in files:
                numbered = parse_rows(file) if suffix(file) in PARSED else enumerate(_typed_rows(file), start=1)
                yield from (StreamedRow(str(file), number, row) for number, row in numbered)
            return
        dataset = open_saved(self.name, path, self.split) if path.is_dir() else stream_named(self.name, self.split)
        yield from (StreamedRow(self.name, number, row) for number, row in enumerate(dataset, start=1))

    def table(self, rows: Sequence[StreamedRow], columns: Iterable[str]) -> Table:
        """Some rows as a table.

        Args:
            rows: In any order.
            columns: Names that the table has beside those of the rows, since other rows have them.
        """
        found = {**dict.fromkeys(columns, False), **json_columns(row.row for row in rows)}
        plain = [row.row for row in rows]
        dataset = hf_datasets().Dataset.from_dict(
            {name: column_texts(plain, name, is_json) for name, is_json in found.items()}
        )
        files = list(dict.fromkeys(row.file for row in rows))
        sizes = {file: max(row.number for row in rows if row.file == file) for file in files}
        first = {file: sum(sizes[before] for before in files[:place]) for place, file in enumerate(files)}
        return Table(
            source=self.name,
            dataset=dataset,
            positions=[first[row.file] + row.number - 1 for row in rows],
            parts=[TablePart(file, sizes[file]) for file in files],
            json_columns=frozenset(name for name, is_json in found.items() if is_json),
        )


def _typed_rows(path: Path) -> Iterator[Any]:
    for batch in typed_batches(path):
        yield from batch.to_pylist()
