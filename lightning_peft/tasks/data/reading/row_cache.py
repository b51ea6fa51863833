"""``cached_rows`` keeps rows in memory-mapped files of the library's cache, where later runs find them again."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.core.optional_imports import check_extra

if TYPE_CHECKING:
    from datasets import Dataset


def hf_datasets() -> ModuleType:
    """The module ``datasets``, imported on first use because it is an optional dependency.

    Raises:
        ImportError: If it is not installed.
    """
    check_extra("datasets", "Reading rows needs datasets", "text")
    return importlib.import_module("datasets")


def cached_rows(key: str | None, write: Callable[[Path], None]) -> tuple[Dataset, Path]:
    """The rows that are kept under a key, and the folder they lie in.

    Of several processes that ask for the same rows, on one machine or with a shared cache, one writes and the others
    wait. If it fails, the next one tries, so that each process has the error.

    Args:
        key: Of all that the rows depend on; None keeps them for this process alone.
        write: Writes the rows as .arrow files into a folder, if they are not there.

    Raises:
        OSError: If the disk is full.
    """
    filelock = importlib.import_module("filelock")
    folder = cache_folder() / key if key else _scratch() / uuid.uuid4().hex
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _write_whole(folder, write)
    datasets = hf_datasets()
    parts = [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts), folder


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Write all or nothing: what a run that was stopped has written is not taken for the rows."""
    with tempfile.TemporaryDirectory(prefix="writing-", dir=folder.parent, ignore_cleanup_errors=True) as name:
        part = Path(name, "rows")
        part.mkdir()
        try:
            write(part)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"The disk of {str(folder.parent)!r} is full, where rows are kept. Free some space, or set the "
                "environment variable HF_DATASETS_CACHE to a folder with more",
            ) from error
        os.replace(part, folder)


def file_version(path: Path) -> list[str | int]:
    """What differs from an earlier time if the content of a file does.

    Args:
        path: The file.
    """
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def write_batches(folder: Path, batches: Iterable[Any], source: str) -> bool:
    """Write record batches into the folder's one file, all with the types of the first.

    Args:
        folder: That `cached_rows` asks to fill.
        batches: At least one, or nothing is written.
        source: Where they come from, as an error says it.

    Returns:
        Whether there were any.

    Raises:
        ValueError: If a batch has columns of other types.
    """
    pyarrow = importlib.import_module("pyarrow")
    schema = None
    with contextlib.ExitStack() as stack:
        for batch in batches:
            if schema is None:
                schema = batch.schema
                writer = stack.enter_context(pyarrow.ipc.new_stream(str(folder / "rows.arrow"), schema))
            try:
                same = batch.schema.equals(schema)
                table = pyarrow.Table.from_batches([batch])
                writer.write_table(table if same else table.select(schema.names).cast(schema))
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"Rows of {source} have columns of other types than rows before them: {_described(batch.schema)}, "
                    f"expected {_described(schema)}. Give all rows the same columns of the same types."
                ) from error
    return schema is not None


def _described(schema: Any) -> str:
    return ", ".join(f"{field.name!r} of {field.type}" for field in schema)


def cache_folder() -> Path:
    """Where rows are kept: in ``HF_DATASETS_CACHE``, or for this process alone if that cannot be written."""
    folder = Path(hf_datasets().config.HF_DATASETS_CACHE) / "lightning_peft"
    return folder if _is_writable(folder) else _scratch()


@functools.cache
def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        rank_zero_warn(
            f"{str(folder)!r} cannot be written ({error}), so rows are read and tokenised anew in each run. Set the "
            "environment variable HF_DATASETS_CACHE to a folder that can."
        )
        return False


@functools.cache
def _scratch_folder(process: int) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lightning-peft-rows-", ignore_cleanup_errors=True)


def _scratch() -> Path:
    """Return a folder that is removed when this process ends."""
    return Path(_scratch_folder(os.getpid()).name)
