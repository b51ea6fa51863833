"""``Table``: rows of a data set that stay on disk, with errors that name the row and the column at fault."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.tasks.messages import did_you_mean, quoted, where

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TablePart:
    """One of the files that a table is read from.

    Args:
        source: The file.
        rows: How many rows it has.
        numbered: Returns the number of each row as a person counts them; by default 1, 2, and so on.
    """

    source: str
    rows: int
    numbered: Callable[[], list[int]] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Rows of one data set.

    Args:
        source: Where they come from, as errors name it.
        dataset: The rows; what a JSON row lacks is None.
        positions: Of each row, its position in the source, from 0 on.
        parts: The files of the source, in order; none where rows are simply counted.
        json_columns: Names of columns whose values are stored as JSON.
        version: What changes whenever the source does; None if that is not known.
    """

    source: str
    dataset: Dataset
    positions: Sequence[int]
    parts: Sequence[TablePart] = ()
    json_columns: frozenset[str] = field(default_factory=frozenset)
    version: str | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        names: list[str] = self.dataset.column_names
        return names

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows in memory."""
        columns = [self.values(name) for name in self.columns]
        return [dict(zip(self.columns, values, strict=True)) for values in zip(*columns, strict=True)]

    @property
    def numbers(self) -> list[int]:
        """The number of each row in its file: the line it starts on, or its position; both start at 1."""
        return [number for _, number in self._places(range(len(self)))]

    def take(self, indices: Sequence[int]) -> Table:
        """Some of the rows."""
        whole = isinstance(indices, range) and isinstance(self.positions, range)
        positions: Any = self.positions[indices.start : indices.stop : indices.step] if whole else None  # type: ignore[attr-defined]
        if positions is None:
            positions = np.asarray(self.positions)[np.asarray(indices, dtype=np.int64)]
        return replace(self, dataset=self.dataset.select(indices), positions=positions)

    def values(self, column: str) -> list[Any]:
        """One column."""
        if column not in self.columns:
            raise ValueError(
                f"{self.source!r} has no column {column!r}. Its columns: {quoted(self.columns)}."
                f"{did_you_mean(column, self.columns)} Give the name of one of them."
            )
        values = list(self.dataset[column][:])  # at once: to iterate formats row by row, which takes ten times as long
        if column in self.json_columns:
            column_values: list[Any] = json.loads(f"[{','.join('null' if v is None else v for v in values)}]")
            return column_values
        return values

    def texts(self, column: str, *, blank: bool = False) -> list[str]:
        """One column of text.

        Args:
            column: Its name.
            blank: Whether a value may be missing or empty; it is then the empty text.
        """
        values = ["" if value is None else value for value in self.values(column)]
        self.refuse(
            [index for index, value in enumerate(values) if not isinstance(value, str)],
            f"Column {column!r} of {self.source!r} holds something else than text in {{rows}}.",
        )
        empty = [] if blank else [index for index, value in enumerate(values) if not value.strip()]
        self.refuse(empty, f"Column {column!r} of {self.source!r} is empty in {{rows}}. Fill or remove what is empty.")
        return values

    def refuse(self, wrong: Sequence[int], message: str) -> None:
        """Raise an error that names rows, if there are any.

        Args:
            wrong: Indices of the rows at fault in this table.
            message: With ``{rows}`` where the rows are to be named.

        Raises:
            ValueError: If there are rows at fault.
        """
        if wrong:
            places = self._places(wrong)
            first = places[0][0]
            rows = where([number for part, number in places if part == first])
            if len(self.parts) > 1:
                more = len(places) - sum(part == first for part, _ in places)
                rows += f" of {self.parts[first].source!r}" + (f" and {more} of other files" if more else "")
            raise ValueError(message.replace("{rows}", rows))

    def _places(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return which file each row is from, and its number there."""
        ends = list(accumulate(part.rows for part in self.parts))
        numbers: dict[int, list[int]] = {}
        found = []
        for position in (int(self.positions[index]) for index in indices):
            part = bisect_right(ends, position)
            if part == len(ends):  # of no file
                found.append((part, position + 1))
                continue
            first = ends[part] - self.parts[part].rows
            numbered = self.parts[part].numbered
            if numbered is not None and part not in numbers:
                numbers[part] = numbered()
            found.append((part, numbers[part][position - first] if numbered else position - first + 1))
        return found
