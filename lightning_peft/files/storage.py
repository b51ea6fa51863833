"""Files by path or by address (``s3://bucket/adapter``), which fsspec opens as it does for Lightning's checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import fsspec

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(://|::)")
_LOST_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_LOCAL = ("file", "local")

Location = str | os.PathLike[str]


def is_remote(path: Location) -> bool:
    """Return whether a path is an address of a file system that fsspec opens, other than that of this machine."""
    found = _ADDRESS.match(os.fspath(path))
    return found is not None and found[1] not in _LOCAL


def local_path(path: Location) -> Path:
    """Return the path on this machine that a path or a ``file://`` address means."""
    text = os.fspath(path)
    lost = _LOST_SLASH.match(text)
    if lost is not None and lost[1] in fsspec.available_protocols():
        raise ValueError(f"{text} lost a slash of its address; give it as a text, not as a Path.")
    return Path(fsspec.core.url_to_fs(text)[1]) if _ADDRESS.match(text) else Path(text)


def file_system(path: Location) -> tuple[Any, str]:
    """Return the file system of an address, and the path there.

    Raises:
        ValueError: There is no such file system, or its package is not installed.
    """
    try:
        system, inner = fsspec.core.url_to_fs(os.fspath(path))
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{os.fspath(path)} cannot be opened ({error}); give a path, or install its package."
        ) from error
    return system, inner.rstrip("/")


def check_local(path: Location, what: str) -> Path:
    """Return a path on this machine; raise a ``ValueError`` if it is an address."""
    if is_remote(path):
        raise ValueError(f"{os.fspath(path)} is an address, and {what}. Give a folder of this machine, and copy it.")
    return local_path(path)


def joined(folder: Location, name: str) -> str:
    """Return the path or address of a file in a folder."""
    return f"{os.fspath(folder).rstrip('/')}/{name}" if is_remote(folder) else str(local_path(folder) / name)


def is_file(path: Location) -> bool:
    """Return whether there is a file."""
    if not is_remote(path):
        return local_path(path).is_file()
    system, inner = file_system(path)
    return bool(system.isfile(inner))


def is_folder(path: Location) -> bool:
    """Return whether there is a folder."""
    if not is_remote(path):
        return local_path(path).is_dir()
    system, inner = file_system(path)
    return bool(system.isdir(inner))


def is_taken(path: Location) -> bool:
    """Return whether the path exists and is not an empty folder, so that a new folder would replace something."""
    if is_remote(path):
        system, inner = file_system(path)
        return bool(system.exists(inner)) and not (system.isdir(inner) and not system.ls(inner))
    local = local_path(path)
    return local.exists() and (not local.is_dir() or any(local.iterdir()))


def open_file(path: Location) -> Any:
    """Open a file for reading bytes."""
    if not is_remote(path):
        return local_path(path).open("rb")
    system, inner = file_system(path)
    return system.open(inner, "rb")
