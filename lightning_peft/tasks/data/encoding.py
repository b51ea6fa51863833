"""``encode_table`` tokenises the rows of a split once; what it made is kept for the next run."""

from __future__ import annotations

import hashlib
import inspect
import json
import uuid
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.tasks.data.examples import Example, Examples
from lightning_peft.tasks.data.tables import Table

if TYPE_CHECKING:
    from lightning_peft.tasks.data.splits import Split
    from lightning_peft.tasks.data.table_data import TableDataModule

_CUT = "cut"  # of an example: whether a part of its row did not fit
_LOADING = ("train", "validation", "test", "predict", "batch_size", "num_workers", "group_by_length", "padding")


def encode_table(data: TableDataModule, split: Split, table: Table) -> Examples:
    """Return the encoded rows of a table, by the data's ``encode``, a thousand rows at a time; say what did not fit.

    Args:
        data: Whose rows they are.
        split: That of the rows.
        table: The rows.

    Raises:
        ValueError: No row is left.
    """

    def encode(indices: list[int]) -> dict[str, list[Any]]:
        return _columns(data.encode(split, table.take(indices)))

    rows = table.dataset.map(
        encode,
        input_columns=[],
        batched=True,
        with_indices=True,
        remove_columns=table.columns,
        new_fingerprint=_fingerprint(data, split, table),
    )
    if not len(rows):
        raise ValueError(data.dropped(split, table.source, len(table), len(table)))
    if len(rows) < len(table):
        rank_zero_warn(data.dropped(split, table.source, len(table) - len(rows), len(table)))
    if _CUT in rows.column_names:
        if cut := sum(rows[_CUT]):
            rank_zero_warn(data.was_cut(table.source, cut, len(table)))
        rows = rows.remove_columns(_CUT)
    return Examples(rows)


def _columns(examples: list[Example]) -> dict[str, list[Any]]:
    names = list(examples[0]) if examples else []
    return {name: [example[name] for example in examples] for name in names}


def _fingerprint(data: TableDataModule, split: Split, table: Table) -> str:
    """Return the key that the library keeps the encoded rows by: all that they depend on."""
    sources = [_source(kind) for kind in type(data).__mro__ if kind.__module__.partition(".")[0] != "lightning"]
    settings = {name: value for name, value in data.hparams.items() if name not in _LOADING}
    if not settings or None in sources:  # what is not known may have changed
        return uuid.uuid4().hex
    tokenizer: Any = data.tokenizer
    written = [tokenizer.get_vocab(), tokenizer.init_kwargs, getattr(tokenizer, "chat_template", None)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written.append(backend.to_str() if backend is not None else "")
    key = [table.dataset._fingerprint, split, settings, getattr(data, "classes", None), written, sources]
    return hashlib.sha256(json.dumps(key, default=str, sort_keys=True).encode()).hexdigest()


def _source(kind: type) -> str | None:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return None if kind is not object else ""
