"""``Table``: rows of a data set that stay on disk, with errors that name the row and the column at fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_peft.tasks.messages import did_you_mean, quoted, where

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Rows of one data set.

    Args:
        source: Where they come from, as errors name it.
        dataset: The rows; what a JSON row lacks is None.
        positions: Of each row, its position in the source, from 0 on.
        numbered: Returns the number of each row of the source as a person counts them; by default 1, 2, and so on.
    """

    source: str
    dataset: Dataset
    positions: Sequence[int]
    numbered: Callable[[], list[int]] | None = None

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
        rows: list[dict[str, Any]] = self.dataset.to_list()
        return rows

    @property
    def numbers(self) -> list[int]:
        """The number of each row: the line it starts on, or its position; both start at 1."""
        if self.numbered is None:
            return [position + 1 for position in self.positions]
        numbers = self.numbered()
        return [numbers[position] for position in self.positions]

    def take(self, indices: Sequence[int]) -> Table:
        """Some of the rows."""
        return Table(
            source=self.source,
            dataset=self.dataset.select(indices),
            positions=[self.positions[index] for index in indices],
            numbered=self.numbered,
        )

    def values(self, column: str) -> list[Any]:
        """One column."""
        if column not in self.columns:
            raise ValueError(
                f"{self.source!r} has no column {column!r}. Its columns: {quoted(self.columns)}."
                f"{did_you_mean(column, self.columns)} Give the name of one of them."
            )
        return list(self.dataset[column])

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
            numbers = self.numbers
            raise ValueError(message.replace("{rows}", where([numbers[index] for index in wrong])))
