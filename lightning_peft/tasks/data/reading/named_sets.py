"""Data sets that have names of their own: of the Hugging Face hub, or in a folder that the library has saved."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lightning_peft.tasks.data.reading.row_cache import file_version, hf_datasets
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.messages import close_paths, did_you_mean, quoted

_PART = r"[A-Za-z0-9_.\-]+"
_NAME = re.compile(rf"(?P<reference>(?:{_PART}/)?{_PART})(?::(?P<config>{_PART})(?=:))?(?::(?P<split>.+))?")


def is_hub_name(name: str) -> bool:
    """Whether a name may be one of the hub, with a split.

    Args:
        name: Of the rows.
    """
    return ":" in name[2:] and _NAME.fullmatch(name) is not None  # the second letter is a colon where drives have names


def load_saved(name: str, folder: Path, split: str) -> Table:
    """The rows of a folder that ``save_to_disk`` has written.

    Args:
        name: As errors name it.
        folder: Its path.
        split: Which of several splits, where the folder has some.

    Raises:
        ValueError: If it is no such folder, or has no such split.
    """
    dataset = open_saved(name, folder, split)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".arrow", ".json"))
    return _table(name, dataset, json.dumps([[file_version(path) for path in files], split]))


def open_saved(name: str, folder: Path, split: str) -> Any:
    """The data set of such a folder; the arguments are those of `load_saved`."""
    if not any((folder / file).is_file() for file in ("dataset_dict.json", "dataset_info.json", "state.json")):
        raise ValueError(
            f"{name!r} is a folder, and not one that save_to_disk of datasets has written. Give a file, or a pattern "
            f"such as {str(folder / '*.jsonl')!r}."
        )
    loaded = hf_datasets().load_from_disk(str(folder))
    return _of_split(name, loaded, split) if isinstance(loaded, dict) else loaded


def load_named(name: str, split: str) -> Table:
    """The rows of a data set of the hub, or of a saved folder with a split: ``name``, ``name:split``, and the like.

    Args:
        name: A name, and after colons a configuration and a split; a split alone if there is one colon.
        split: Which split is meant if the name does not say so.

    Raises:
        FileNotFoundError: If it cannot be reached.
        ValueError: If it has no such split.
    """
    dataset = _named(name, split, streaming=False)
    return dataset if isinstance(dataset, Table) else _table(name, dataset, None)


def stream_named(name: str, split: str) -> Any:
    """The rows of such a data set as an iterable; the arguments are those of `load_named`."""
    dataset = _named(name, split, streaming=True)
    return dataset.dataset if isinstance(dataset, Table) else dataset


def _named(name: str, split: str, streaming: bool) -> Any:
    folder, _, own = name.rpartition(":")
    path = Path(folder or name).expanduser()
    if folder and path.is_dir():
        return load_saved(folder, path, own)
    found = _NAME.fullmatch(name)
    if found is None:
        raise FileNotFoundError(f"There is no file or folder {name!r}. {close_paths(path, path.parent.glob('*'))}")
    return _from_hub(name, found["reference"], found["config"], found["split"] or split, streaming)


def _from_hub(name: str, reference: str, config: str | None, split: str, streaming: bool) -> Any:
    datasets = hf_datasets()
    try:
        return datasets.load_dataset(reference, config, split=split, streaming=streaming)
    except (OSError, ConnectionError) as error:
        path = Path(reference)
        raise FileNotFoundError(
            f"There is no file or folder {name!r}, and no data set of this name could be loaded from the hub "
            f"({str(error).partition(chr(10))[0].rstrip('.')}). {close_paths(path, path.parent.glob('*'))} "
            "A data set of the hub is written owner/name, owner/name:split or owner/name:config:split."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"The data set {reference!r} of the hub has no split {split!r} that could be loaded ({error}). Name "
            f"another one: {reference}:train, or {reference}:config:train."
        ) from error


def _of_split(name: str, splits: dict[str, Any], split: str) -> Any:
    if split not in splits:
        raise ValueError(
            f"{name!r} has no split {split!r}. Its splits: {quoted(splits)}.{did_you_mean(split, splits)} Name one: "
            f"{name}:{next(iter(splits), 'train')}."
        )
    return splits[split]


def _table(name: str, dataset: Any, version: str | None) -> Table:
    if not len(dataset):
        raise ValueError(f"{name!r} holds no rows. Give a data set with at least one.")
    version = version or dataset._fingerprint  # of a data set of the hub, which does not change under one
    return Table(source=name, dataset=dataset, positions=range(len(dataset)), version=version)
