"""Partitions assign rows to clients, and hold out some rows of each client for its test."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lightning_peft.tasks.data.reading.read_table import read_table
from lightning_peft.tasks.data.reading.splits import Split, Splits
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.messages import quoted


@dataclass(frozen=True, kw_only=True)
class Partition(ABC):
    """Gives rows to clients.

    Examples:
        >>> from lightning_peft.recipes.federated import Dirichlet
        >>> Dirichlet(clients=3).count  # one of three partitions; a class of your own gives ``count`` and ``rows``
        3
    """

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of clients."""

    @abstractmethod
    def rows(self, table: Table, client: int) -> Table:
        """Return the rows of one client; ``table`` is the train file."""


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Partition):
    """Gives each label's rows to clients by shares that are drawn from Dirichlet(alpha); no row has two clients.

    At an alpha of 0.1 most clients see few labels, at 100 they are alike (https://arxiv.org/abs/1909.06335).

    Args:
        clients: Number of clients.
        alpha: Concentration of the shares.
        label: Column of the label.
        min_rows: Shares are drawn anew until each client has as many rows.
        seed: Of shares and rows.

    Examples:
        >>> from lightning_peft.recipes.federated import Dirichlet
        >>> sorted(sum(Dirichlet(clients=3, min_rows=2).indices(["a", "b"] * 10), [])) == list(range(20))
        True
    """

    clients: int = 8
    alpha: float = 0.3
    label: str = "label"
    min_rows: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("clients", "min_rows"):
            if getattr(self, name) < 2:
                raise ValueError(f"Got {name}={getattr(self, name)}, expected 2 or more.")
        if not self.alpha > 0:
            raise ValueError(f"Got alpha={self.alpha}, expected a number above 0, such as 0.3.")

    @property
    def count(self) -> int:
        return self.clients

    def rows(self, table: Table, client: int) -> Table:
        return table.take(self.indices([str(value) for value in table.values(self.label)])[client])

    def indices(self, labels: list[str]) -> list[list[int]]:
        """Return the row numbers of each client, from 0, given the label of each row.

        Raises:
            ValueError: No draw of a thousand gives each client enough rows.
        """
        generator = np.random.default_rng(self.seed)
        rows = {label: np.flatnonzero(np.array(labels) == label) for label in sorted(set(labels))}
        for _ in range(1000):
            shards: list[list[int]] = [[] for _ in range(self.clients)]
            for label_rows in rows.values():
                shares = generator.dirichlet(np.full(self.clients, self.alpha))
                cuts = (np.cumsum(shares)[:-1] * len(label_rows)).round().astype(int)
                for shard, rows_of_label in zip(shards, np.split(generator.permutation(label_rows), cuts), strict=True):
                    shard += rows_of_label.tolist()
            if min(map(len, shards)) >= self.min_rows:
                return [sorted(shard) for shard in shards]
        raise ValueError(
            f"{len(labels)} rows give {self.clients} clients no {self.min_rows} rows each at alpha={self.alpha}. "
            "Take fewer clients, a larger alpha, or lower min_rows."
        )


@dataclass(frozen=True, kw_only=True)
class IndexLists(Partition):
    """Gives each client the rows that a JSON file lists: one list of row numbers (from 0) for each client.

    Args:
        path: The file, which holds the list of lists, or an object with it under ``clients``.

    Examples:
        >>> from lightning_peft.recipes.federated import IndexLists
        >>> with open("rows.json", "w") as file:
        ...     _ = file.write("[[0, 2], [1, 3, 4]]")
        >>> IndexLists(path="rows.json").count
        2
    """

    path: str

    @property
    def count(self) -> int:
        return len(self.lists)

    def rows(self, table: Table, client: int) -> Table:
        lists = self.lists
        largest = max(max(numbers, default=0) for numbers in lists)
        if largest >= len(table):
            raise ValueError(
                f"{self.path!r} names row {largest}, but {table.source!r} ends with row {len(table) - 1}. "
                "The lists belong to another file."
            )
        return table.take(lists[client])

    @cached_property
    def lists(self) -> list[list[int]]:
        """What the file holds, read once and checked."""
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"The file {self.path!r} of index lists does not exist.")
        content = json.loads(Path(self.path).read_text(encoding="utf-8"))
        lists = content.get("clients") if isinstance(content, dict) else content
        if not isinstance(lists, list) or len(lists) < 2 or not all(isinstance(numbers, list) for numbers in lists):
            raise ValueError(f"{self.path!r} holds no list of row numbers for each of two clients or more.")
        rows = [row for numbers in lists for row in numbers]
        if not all(type(row) is int and row >= 0 for row in rows):
            raise ValueError(f"{self.path!r} holds something else than row numbers from 0.")
        if len(rows) != len(set(rows)):
            raise ValueError(f"{self.path!r} gives a row twice; each belongs to one client, once.")
        return lists


@dataclass(frozen=True, kw_only=True)
class Files(Partition):
    """Each client has a file of its own, on its own machine if need be; the train file only says which labels exist.

    Args:
        paths: A file for each client.

    Examples:
        >>> from lightning_peft.recipes.federated import Files
        >>> Files(paths=["north.csv", "south.csv"]).count
        2
    """

    paths: list[str]

    def __post_init__(self) -> None:
        if len(self.paths) < 2 or len(self.paths) != len(set(self.paths)):
            raise ValueError(f"Got paths={self.paths!r}, expected two different files or more.")

    @property
    def count(self) -> int:
        return len(self.paths)

    def rows(self, table: Table, client: int) -> Table:
        return read_table(self.paths[client])


class Shard(Splits):
    """One client's rows as splits: some to train on, the others held out for its own test.

    Args:
        splits: Those of the data module; its train file goes on to say which labels exist.
        rows: All rows of the client.
        test_fraction: Share to hold out, at least one row.
        seed: Which rows are held out.
    """

    def __init__(self, splits: Splits, rows: Table, test_fraction: float, seed: int) -> None:
        super().__init__(splits.files, {}, 0.0)
        count = max(1, round(len(rows) * test_fraction))
        if count >= len(rows):
            raise ValueError(f"{rows.source!r} leaves {len(rows)} rows, too few to train on and to test.")
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        self._parts = {"train": rows.take(sorted(order[count:])), "test": rows.take(sorted(order[:count]))}

    def has(self, split: Split) -> bool:
        return split in self._parts

    def rows(self, split: Split) -> Table:
        if split not in self._parts:
            raise ValueError(f"A client has no rows for {split!r}; it has {quoted(self._parts)}.")
        return self._parts[split]
