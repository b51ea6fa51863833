"""Temporary files and folders beside their target, locked while their writer lives, and removed once it does not.

The system drops a lock when its process ends, also by a kill, so that what can be locked here is a leftover.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".partial"
_DAY = 24 * 60 * 60  # in seconds; after it, what cannot be locked on this file system counts as a leftover


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Context with an empty folder beside ``target``; whatever is at its path afterwards is removed."""
    while True:
        folder = _new_path(target)
        folder.mkdir()
        handle = _lock(folder)
        if _is_same(handle, folder):
            break
        _close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _close(handle)


@contextlib.contextmanager
def temporary_file(target: Path, content: bytes) -> Iterator[Path]:
    """Context with a file of this content beside ``target``; it is removed afterwards unless it was renamed."""
    while True:
        path = _new_path(target)
        path.touch(exist_ok=False)
        handle = _lock(path)
        if _is_same(handle, path):
            break
        _close(handle)
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)
        _close(handle)


def remove_leftovers(target: Path) -> None:
    """Remove the temporary files and folders of a target whose writers have died."""
    for path in partial_paths(target):
        handle = _lock(path, wait=False)
        with contextlib.suppress(OSError):  # another process removes it at the same time
            if _is_abandoned(handle, path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        _close(handle)


def partial_paths(target: Path) -> list[Path]:
    """Return the temporary files and folders of a target, of living writers and of dead ones."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(_SUFFIX)}")
    try:
        return [target.parent / name for name in os.listdir(target.parent) if pattern.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_partial(name: str) -> bool:
    """Return whether a file of this name is a temporary one of this module."""
    return re.fullmatch(rf"\..*\.[0-9a-f]{{8}}{re.escape(_SUFFIX)}", name) is not None


def _new_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}")


def _lock(path: Path, wait: bool = True) -> int | None:
    """Lock a path, or nothing where it is gone, somebody else has it, or the system has no locks; see ``_is_same``."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return -1
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        _close(handle)
        return -1
    except OSError:  # a file system without locks
        _close(handle)
        return None
    return handle


def _is_same(handle: int | None, path: Path) -> bool:
    """Return whether a path is still what was locked; it may have been removed as a leftover before it was."""
    if handle is None:
        return True
    try:
        return handle >= 0 and os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _is_abandoned(handle: int | None, path: Path) -> bool:
    return handle >= 0 if handle is not None else time.time() - path.stat().st_mtime > _DAY


def _close(handle: int | None) -> None:
    if handle is not None and handle >= 0:
        os.close(handle)
