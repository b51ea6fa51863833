"""``write_adapter`` and ``read_adapter``: a folder of ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapter(folder: str | os.PathLike[str], description: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """Write an adapter's description and tensors; each file replaces an older one only once it is complete."""
    storages = Counter(map(_storage, state.values()))  # safetensors files hold no two tensors of one storage
    weights = save({name: t.clone() if storages[_storage(t)] > 1 else t for name, t in state.items()})
    config = {"library": "lightning_peft", **description, "sha256": hashlib.sha256(weights).hexdigest()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, weights)
    write_json(folder / CONFIG, config)
    return folder


def _storage(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor and all views of it share."""
    return tensor.untyped_storage().data_ptr()


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of an adapter folder.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, of another library, or does not belong to the other file.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no adapter folder: {name} is missing. Expected what save_adapter wrote."
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({error}); save the adapter again.") from error
    if not isinstance(config, dict) or config.get("library") != "lightning_peft":
        raise ValueError(f"{folder / CONFIG} was not written by lightning_peft; another library's adapter is imported.")
    weights = (folder / WEIGHTS).read_bytes()
    try:
        state = load(weights)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or cut short ({error}); copy or save it again.") from error
    if hashlib.sha256(weights).hexdigest() != config.get("sha256"):
        raise ValueError(f"{folder / WEIGHTS} is not what {CONFIG} describes (checksum); copy both files together.")
    return config, state


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data as JSON by ``replace_file``."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new content, never a part of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def is_taken(path: Path) -> bool:
    """Return whether the path exists and is not an empty folder, so that a new folder would replace something."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))
