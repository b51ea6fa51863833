"""``write_adapter`` and ``read_adapter``: a folder of ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..files.atomic_files import replace_file, replace_files
from ..files.checksums import settings_digest
from ..files.read_json import MAX_JSON, parse_json
from ..files.safetensors_header import read_header, with_metadata
from ..files.storage import Location, file_system, is_remote, local_path
from ..files.temporary_paths import is_partial
from .method import from_dict

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CHECKSUM, _OF_SETTINGS = (
    "sha256",
    "settings_sha256",
)  # in the settings, of the file of tensors, and in that, of settings
_ATTEMPTS = 50  # to read a folder that is being written


def write_adapter(
    folder: Location, description: Mapping[str, Any], state: Mapping[str, Tensor], others: Mapping[str, bytes] = {}
) -> Path | str:
    """Write an adapter's description and tensors, and other files, at once in place of those in the folder."""
    storages = Counter(map(_storage, state.values()))  # safetensors files hold no two tensors of one storage
    weights = save({name: t.clone() if storages[_storage(t)] > 1 else t for name, t in state.items()})
    config = {"library": "lightning_peft", **{key: value for key, value in description.items() if key != _CHECKSUM}}
    weights = with_metadata(weights, {_OF_SETTINGS: settings_digest(config)})
    config[_CHECKSUM] = hashlib.sha256(weights).hexdigest()
    replace_files(folder, {**others, WEIGHTS: weights, CONFIG: json_bytes(config)})
    return located(folder)


def located(folder: Location) -> Path | str:
    """Return a folder as functions that write it do: its path, or its address as it was given."""
    return os.fspath(folder) if is_remote(folder) else local_path(folder)


def _storage(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor and all views of it share."""
    return tensor.untyped_storage().data_ptr()


def read_adapter(folder: Location) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of an adapter folder.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, of another library, or does not belong to the other file.
    """
    for attempt in range(_ATTEMPTS):
        files = read_files(folder, (CONFIG, WEIGHTS))
        for name in (CONFIG, WEIGHTS):
            if name not in files:
                raise FileNotFoundError(
                    f"{folder} is no adapter folder: {name} is missing. Expected what save_adapter wrote."
                )
        try:
            return _checked(folder, files)
        except ValueError:
            if attempt == _ATTEMPTS - 1 or not _is_being_written(folder):
                raise
        time.sleep(0.01)
    raise AssertionError("unreachable")


def _checked(folder: Location, files: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = parse_json(files[CONFIG], f"{folder}/{CONFIG}")
    if config.get("library") != "lightning_peft":
        raise ValueError(f"{folder}/{CONFIG} was not written by lightning_peft; another library's adapter is imported.")
    state, metadata = parse_weights(files[WEIGHTS], f"{folder}/{WEIGHTS}")
    if hashlib.sha256(files[WEIGHTS]).hexdigest() != config.pop(_CHECKSUM, None):
        raise ValueError(
            f"{folder}/{WEIGHTS} is not what {CONFIG} describes (checksum); copy both files together, or save again."
        )
    if metadata.get(_OF_SETTINGS) not in (None, settings_digest(config)):  # files of earlier versions have none
        _check_methods(config.get("methods"))  # says more, where it refuses them
        raise ValueError(
            f"{folder}/{CONFIG} was changed since it was saved (checksum); copy it again. To change settings, load the "
            f"adapter, and save it with others."
        )
    return config, state


def _check_methods(methods: Any) -> None:
    for data in methods[:100] if isinstance(methods, list) else ():
        if isinstance(data, dict):
            from_dict(data)


def parse_weights(content: bytes, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in the content of a safetensors file, and the metadata in its header.

    Raises:
        ValueError: It is damaged.
    """
    header = read_header(io.BytesIO(content), len(content), source)
    try:
        return load(content), header.metadata
    except SafetensorError as error:
        raise ValueError(f"{source} is damaged or cut short ({error}); copy or save it again.") from error


def read_files(folder: Location, names: Iterable[str]) -> dict[str, bytes]:
    """Return the content of those of the files of a folder that are there, all of one state of the folder.

    Raises:
        ValueError: A file has another size than its header says, or is too large for settings.
    """
    if is_remote(folder):
        system, inner = file_system(folder)
        return {name: system.cat_file(f"{inner}/{name}") for name in names if system.isfile(f"{inner}/{name}")}
    for _ in range(_ATTEMPTS):
        try:
            return _read_local(local_path(folder), names)
        except FileNotFoundError:  # the folder was replaced, and this state of it removed
            continue
    return {}


def _read_local(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Read files of the folder that has its name now, even if that name goes to another folder meanwhile."""
    if os.open not in os.supports_dir_fd:  # Windows
        return {
            name: _content((folder / name).open("rb"), folder / name) for name in names if (folder / name).is_file()
        }
    handle = os.open(folder, os.O_RDONLY)
    try:
        found = set(os.listdir(handle)) & {*names}
        if found != {*names} and not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise FileNotFoundError(f"{folder} was replaced, and its former files are removed")
        return {
            name: _content(open(name, "rb", opener=lambda n, f: os.open(n, f, dir_fd=handle)), folder / name)
            for name in found
        }
    except NotADirectoryError:
        return {}
    finally:
        os.close(handle)


def _content(file: IO[bytes], path: Path) -> bytes:
    """Return the content of an open file; its size is checked before its content is read."""
    with file:
        size = os.fstat(file.fileno()).st_size
        if path.suffix == ".safetensors":
            read_header(file, size, str(path))
        elif path.suffix == ".json" and size > MAX_JSON:
            raise ValueError(f"{path} has {size:,} bytes; at most {MAX_JSON:,} are read as settings.")
        file.seek(0)
        return file.read()


def _is_being_written(folder: Location) -> bool:
    return not is_remote(folder) and any(map(is_partial, os.listdir(local_path(folder))))


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return plain data as JSON."""
    return (json.dumps(content, indent=2) + "\n").encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data as JSON by ``replace_file``."""
    replace_file(path, json_bytes(content))
