"""``read_table`` reads rows by HF ``datasets``, so that they lie in memory-mapped files and are read once."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_peft.core.optional_imports import check_extra
from lightning_peft.tasks.data.parse_rows import Row, parse_rows
from lightning_peft.tasks.data.tables import Table
from lightning_peft.tasks.messages import close_paths

if TYPE_CHECKING:
    from datasets import Dataset, Features

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
_DELIMITED = (".csv", ".tsv")
_CHANGED = ("timestamp", "date", "time", "duration")  # what the JSON reader makes of texts that look like them


def hf_datasets() -> ModuleType:
    """The module ``datasets``, imported on first use because it is an optional dependency.

    Raises:
        ImportError: If it is not installed.
    """
    check_extra("datasets", "Reading rows needs datasets", "text")
    return importlib.import_module("datasets")


def read_table(name: str) -> Table:
    """The table in a file.

    Args:
        name: The file, whose suffix says what it is: .csv, .tsv, .json, .jsonl, .txt (a row a line, column ``text``),
            and .gz after any of them, .parquet or .arrow. Texts are UTF-8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If any part of it cannot be read.
    """
    path = Path(name).expanduser()
    suffix = _suffix(path)
    if suffix not in (*_DELIMITED, *_BUILDERS):
        raise ValueError(
            f"{name!r} has the suffix {suffix!r}, expected {', '.join((*_DELIMITED, *_BUILDERS))}, or .gz after one "
            "of text."
        )
    if not path.is_file():
        siblings = (child for child in path.parent.glob("*") if child.is_file())
        raise FileNotFoundError(f"The file {name!r} does not exist. {close_paths(path, siblings)}")
    dataset = _parsed(path) if suffix in _DELIMITED else _loaded(path, _BUILDERS[suffix])
    if not len(dataset):
        raise ValueError(f"{name!r} holds no rows. Give a file with at least one.")
    numbered = partial(_numbers, path) if suffix in (*_DELIMITED, ".jsonl") else None
    return Table(source=str(path), dataset=dataset, positions=range(len(dataset)), numbered=numbered)


def _loaded(path: Path, builder: str) -> Dataset:
    """Return the rows as the library reads them; JSON that it cannot read or would change is parsed by hand."""
    datasets = hf_datasets()
    try:
        dataset: Dataset = datasets.load_dataset(builder, data_files=str(path), split="train")
    except (datasets.exceptions.DatasetGenerationError, StopIteration, ValueError):
        if builder != "json":
            raise
        return _parsed(path)
    changed = builder == "json" and _is_changed(dataset.features)
    return _parsed(path) if changed else dataset


def _is_changed(feature: Any) -> bool:
    """Whether any value of a JSON file has become another: texts that look like dates are read as dates."""
    if isinstance(feature, dict):
        return any(map(_is_changed, feature.values()))
    inner = getattr(feature, "feature", None)
    return _is_changed(inner) if inner is not None else str(getattr(feature, "dtype", "")).startswith(_CHANGED)


def _parsed(path: Path) -> Dataset:
    """Return the rows of a file as they stand there; the library keeps them for the next time."""
    stat = path.stat()
    version = {"path": str(path.resolve()), "size": stat.st_size, "modified": stat.st_mtime_ns}
    datasets = hf_datasets()
    features = _features(path, _suffix(path) not in _DELIMITED)
    if not features:
        return datasets.Dataset.from_dict({})
    columns = tuple(features)  # of a list, the library would make a part of the data from each entry
    try:
        return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs={**version, "columns": columns})
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _rows(path: str, size: int, modified: int, columns: tuple[str, ...]) -> Iterator[Row]:
    """Yield all rows; the size and the time of the last change are in the key that the library keeps them by."""
    names = dict.fromkeys(columns)
    for _, row in parse_rows(Path(path)):
        yield {**names, **row}


def _features(path: Path, is_json: bool) -> Features | None:
    """Return text for each column that holds nothing else, and for the others JSON, which holds anything."""
    datasets = hf_datasets()
    kinds: dict[str, set[type]] = {}
    for _, row in parse_rows(path) if is_json else islice(parse_rows(path), 1):  # CSV has the same columns in each row
        for name, value in row.items():
            kinds.setdefault(name, set()).add(type(value))
    text, anything = datasets.Value("string"), datasets.Json()
    return datasets.Features({name: text if found <= {str, type(None)} else anything for name, found in kinds.items()})


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _numbers(path: Path) -> list[int]:
    return [number for number, _ in parse_rows(path)]
