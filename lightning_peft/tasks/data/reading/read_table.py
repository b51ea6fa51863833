"""``read_table`` reads rows from files, saved folders or the Hugging Face hub into memory-mapped files, once."""

from __future__ import annotations

import glob
import hashlib
import json
from functools import partial
from pathlib import Path

from lightning_peft.tasks.data.reading.named_sets import is_hub_name, load_named, load_saved
from lightning_peft.tasks.data.reading.parse_rows import PARSED, parse_rows, suffix
from lightning_peft.tasks.data.reading.row_cache import cached_rows, file_version
from lightning_peft.tasks.data.reading.tables import Table, TablePart
from lightning_peft.tasks.data.reading.write_rows import FORMAT, WRITTEN, write_rows
from lightning_peft.tasks.messages import close_paths, quoted

BINARY = (".parquet", ".arrow")


def read_table(name: str, split: str = "train") -> Table:
    """The rows that a name means.

    Args:
        name: A file, whose suffix says what it is: .csv, .tsv, .json, .jsonl, .conll or .txt (a row a line, ``text``),
            and .gz after any of them, .parquet or .arrow. Texts are UTF-8. A pattern (``data/*.jsonl``) means all such
            files in the order of their names. A folder is one that the library's ``save_to_disk`` has written. Else it
            is a data set of the hub: ``owner/name``. Its split, and its configuration, follow after colons:
            ``owner/name:validation``, ``owner/name:config:validation``.
        split: Which of several splits is meant if the name does not say so.

    Raises:
        FileNotFoundError: If there is no such file, and no such data set that can be reached.
        ValueError: If any part of it cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return load_saved(name, path, split)
    if path.is_file():
        return _read_files(name, [path])
    if is_pattern(name) or suffix(path) in (*PARSED, *BINARY):
        return _read_files(name, find_files(name))
    return load_named(name, split)


def is_pattern(name: str) -> bool:
    """Whether a name means all files that it matches; brackets also ask for a part of a split on the hub.

    Args:
        name: Of the rows.
    """
    return glob.has_magic(name) and not is_hub_name(name)


def find_files(name: str) -> list[Path]:
    """The files that a pattern means, or the one of this name, in the order of their names.

    Args:
        name: A pattern, or a path.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(name).expanduser()
    found = [path] if path.is_file() else [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]
    if files := [each for each in found if each.is_file()]:
        return files
    if is_pattern(name):
        raise FileNotFoundError(f"No file matches {name!r}. * stands for any letters of a name, ** for any folders.")
    siblings = (child for child in path.parent.glob("*") if child.is_file())
    raise FileNotFoundError(f"The file {name!r} does not exist. {close_paths(path, siblings)}")


def check_kinds(name: str, paths: list[Path]) -> None:
    """Refuse files that cannot be read, or not together.

    Args:
        name: As errors name them.
        paths: The files.

    Raises:
        ValueError: If their suffixes are unknown, or not the same.
    """
    for path in paths:
        if suffix(path) not in (*PARSED, *BINARY) or (suffix(path) in BINARY and path.suffix == ".gz"):
            raise ValueError(
                f"{str(path)!r} has the suffix {path.suffix!r}, expected {', '.join((*PARSED, *BINARY))}, or .gz after "
                "one of text."
            )
    if len(kinds := {suffix(path) for path in paths}) > 1:
        raise ValueError(f"{name!r} matches files of several kinds: {quoted(sorted(kinds))}. Give those of one kind.")


def _read_files(name: str, paths: list[Path]) -> Table:
    check_kinds(name, paths)
    version = json.dumps([FORMAT, *map(file_version, paths)])
    key = hashlib.sha256(version.encode()).hexdigest()
    dataset, folder = cached_rows(key, partial(write_rows, paths))
    if not len(dataset):
        raise ValueError(f"{name!r} holds no rows. Give a file with at least one.")
    written = json.loads((folder / WRITTEN).read_text())
    return Table(
        source=str(paths[0]) if len(paths) == 1 else name,
        dataset=dataset,
        positions=range(len(dataset)),
        parts=[_part(path, rows) for path, rows in zip(paths, written["rows"], strict=True)],
        json_columns=frozenset(written["json_columns"]),
        version=version,
    )


def _part(path: Path, rows: int) -> TablePart:
    by_position = suffix(path) in (".json", *BINARY)
    return TablePart(str(path), rows, None if by_position else partial(_numbers, path))


def _numbers(path: Path) -> list[int]:
    return [number for number, _ in parse_rows(path)]
