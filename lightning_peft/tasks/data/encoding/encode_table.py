"""``encode_table`` tokenises the rows of a split once; what it made is kept for the next run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lightning_peft.tasks.data.encoding.encoding_key import encoding_key
from lightning_peft.tasks.data.encoding.examples import Example, Examples
from lightning_peft.tasks.data.reading.row_cache import cached_rows, write_batches
from lightning_peft.tasks.data.reading.tables import Table

if TYPE_CHECKING:
    from lightning_peft.tasks.data.reading.splits import Split
    from lightning_peft.tasks.data.table_data import TableDataModule

ROWS = 1000  # that are encoded at a time
CUT = "cut"  # of an example: whether a part of its row did not fit
_BAR_FROM = 20_000  # rows, from which on it is shown how far tokenising has come


def encode_table(data: TableDataModule, split: Split, table: Table) -> Examples:
    """Return the encoded rows of a table, by the data's ``encode``, a thousand rows at a time; say what did not fit.

    Args:
        data: Whose rows they are.
        split: That of the rows.
        table: The rows.

    Raises:
        ValueError: No row is left.
    """
    rows, _ = cached_rows(encoding_key(data, split, table), partial(_write_encoded, data, split, table))
    if len(rows) < len(table):
        rank_zero_warn(data.dropped(split, table.source, len(table) - len(rows), len(table)))
    if CUT in rows.column_names:
        if cut := importlib.import_module("pyarrow.compute").sum(rows.data.column(CUT)).as_py():
            rank_zero_warn(data.was_cut(table.source, cut, len(table)))
        rows = rows.remove_columns(CUT)
    return Examples(rows)


def _write_encoded(data: TableDataModule, split: Split, table: Table, folder: Path) -> None:
    if not write_batches(folder, _encoded(data, split, table), f"{type(data).__name__}.encode"):
        raise ValueError(data.dropped(split, table.source, len(table), len(table)))


def _encoded(data: TableDataModule, split: Split, table: Table) -> Iterator[Any]:
    """Yield the encoded rows as record batches, made by as many processes as the data's loaders have."""
    parts = _Parts(data, split, table)
    loader = DataLoader(
        parts,
        batch_size=None,
        num_workers=data.num_workers if len(parts) > 1 else 0,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # so that the global one does not tell whether rows were kept
    )
    bar = importlib.import_module("datasets.utils.tqdm").tqdm
    hidden = None if len(table) >= _BAR_FROM else True  # None leaves it to the library's settings
    for part in bar(loader, desc=f"Tokenising {split} rows", unit=f" x {ROWS} rows", disable=hidden):
        if isinstance(part, Exception):
            raise part
        if part is not None:
            yield part


class _Parts(Dataset[Any]):
    """Encodes a thousand rows at a time; an error is returned, since workers would hide its words in a traceback."""

    def __init__(self, data: TableDataModule, split: Split, table: Table) -> None:
        self.data, self.split, self.table = data, split, table

    def __len__(self) -> int:
        return -(-len(self.table) // ROWS)

    def __getitem__(self, index: int) -> Any:
        rows = range(len(self.table))[index * ROWS : (index + 1) * ROWS]
        try:
            examples = self.data.encode(self.split, self.table.take(rows))
        except Exception as error:
            if get_worker_info() is None:
                raise
            return error
        return record_batch(examples) if examples else None


def record_batch(examples: list[Example]) -> Any:
    """Examples as an arrow record batch, with tokens of 32 bits.

    Args:
        examples: All with the same names.
    """
    pyarrow = importlib.import_module("pyarrow")
    names = list(examples[0])
    arrays = [pyarrow.array([example[name] for example in examples]) for name in names]
    return pyarrow.RecordBatch.from_arrays([array.cast(_narrow(array.type)) for array in arrays], names)


def _narrow(kind: Any, inside: bool = False) -> Any:
    pyarrow = importlib.import_module("pyarrow")
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(_narrow(kind.value_type, True))
    return pyarrow.int32() if inside and pyarrow.types.is_int64(kind) else kind


def _unchanged(part: Any) -> Any:
    return part
