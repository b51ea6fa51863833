"""``replace_files`` replaces files of a folder at once, ``new_folder`` and ``replace_file`` a folder or a file.

Whoever reads meanwhile, or after a kill, finds all of the old or all of the new, where the system can exchange two
folders in one step: on Linux and macOS, on file systems of their own. Elsewhere (network file systems, a folder with
folders inside, the working directory, addresses) files are replaced one by one, each as a whole and the last given
last; checksums in them then tell that they do not belong together.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .storage import Location, file_system, is_remote, local_path
from .temporary_paths import is_partial, remove_leftovers, temporary_file, temporary_folder

_HERE = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_TO_SYNC = "r+b" if sys.platform == "win32" else "rb"  # Windows syncs nothing that is open for reading alone
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES, errno.EROFS)


def replace_files(folder: Location, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, in place of those that it has; other files in it stay."""
    if is_remote(folder):
        system, inner = file_system(folder)
        system.makedirs(inner, exist_ok=True)
        for name, content in files.items():
            system.pipe_file(f"{inner}/{name}", content)
        return
    target = Path(os.path.realpath(local_path(folder)))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_of(target, files)
    if not _replace_folder(target, files):
        _replace_one_by_one(target, files)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new content, never a part of it."""
    remove_leftovers(path)
    with temporary_file(path, content) as temporary:
        os.replace(temporary, path)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Context with an empty folder, which then gets the name ``target``; nothing is left of it if anything fails.

    Raises:
        FileExistsError: Somebody else has written there meanwhile.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    with temporary_folder(target) as temporary:
        yield temporary
        for path in temporary.iterdir():
            with path.open(_TO_SYNC) as file:
                os.fsync(file.fileno())
        try:
            if sys.platform == "win32" and target.exists():  # where no rename replaces an empty folder
                target.rmdir()
            temporary.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(f"{target} was written meanwhile by somebody else; give another folder.") from error


def _remove_leftovers_of(target: Path, files: Mapping[str, bytes]) -> None:
    remove_leftovers(target)
    for name in files:
        remove_leftovers(target / name)


def _replace_folder(target: Path, files: Mapping[str, bytes]) -> bool:
    """Build the new folder beside the old one and exchange them; return whether that can be done here."""
    if target == Path.cwd() or target in Path.cwd().parents:  # which would become a removed folder
        return False
    try:
        with temporary_folder(target) as temporary:
            for name, content in files.items():
                replace_file(temporary / name, content)
            if not target.exists() and _renamed(temporary, target):
                return True
            if not _link_others(target, temporary, files):
                return False
            shutil.copymode(target, temporary)
            exchanged = _exchange(temporary, target)
            if exchanged:
                _move_late_files(temporary, target)
            return exchanged
    except PermissionError:  # nothing can be created beside the folder
        return False


def _renamed(temporary: Path, target: Path) -> bool:
    """Give a new folder its name, unless somebody else has been faster."""
    try:
        temporary.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _link_others(target: Path, temporary: Path, files: Mapping[str, bytes]) -> bool:
    """Link the other files of a folder into the one that replaces it; return False where there are folders, too."""
    for entry in target.iterdir():
        if entry.name in files or is_partial(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            return False
        try:
            os.link(entry, temporary / entry.name, follow_symlinks=False)
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError:  # a file system without links
            return False
    return True


def _move_late_files(old: Path, new: Path) -> None:
    """Move what somebody else has written into the old folder since its files were linked."""
    with contextlib.suppress(OSError):  # another writer has removed the old folder as a leftover
        for name in os.listdir(old):
            if not is_partial(name) and not os.path.lexists(new / name):
                os.rename(old / name, new / name)


def _replace_one_by_one(target: Path, files: Mapping[str, bytes]) -> None:
    target.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        written = {name: stack.enter_context(temporary_file(target / name, files[name])) for name in files}
        for name, temporary in written.items():
            os.replace(temporary, target / name)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; return False where that is not known."""
    if sys.platform == "win32":
        return False
    library: Any = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(first), os.fsencode(second))
    if hasattr(library, "renameat2"):
        failed = library.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, _EXCHANGE)
    else:
        return False
    if failed and (code := ctypes.get_errno()) not in _UNABLE:
        raise OSError(code, os.strerror(code), str(second))
    return not failed
