"""``code_version`` tells whether the code of a class is the same as in an earlier run."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

_IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+import\s+(\([^)]*\)|[^\n]*)|import\s+([^\n]+))", re.MULTILINE)
_RELEASED = {"site-packages", "dist-packages"}  # folders
_STANDARD = [Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "platstdlib")]


@functools.cache
def code_version(kind: type) -> list[str] | None:
    """Hashes of the files that define a class and its bases, and of what these files import of their own projects.

    Files decide, and not which modules a process has imported so far. Packages that are installed are left out, since
    their versions tell of them.

    Args:
        kind: The class.

    Returns:
        The hashes; None if any of its code is in no file, as that of an interactive session.
    """
    _find.cache_clear()  # files may have come since
    _is_installed.cache_clear()
    hashes: dict[str, str] = {}
    waiting = []
    for base in kind.__mro__:
        if base.__module__ != "builtins":
            if _find(base.__module__) is None:
                return None
            waiting.append(base.__module__)
    while waiting:
        name = waiting.pop()
        file = None if name in hashes else _find(name)
        if file is not None and not _is_installed(file):
            source = file.read_text(encoding="utf-8")
            hashes[name] = hashlib.sha256(source.encode()).hexdigest()
            package = name if file.name == "__init__.py" else name.rpartition(".")[0]
            waiting += _imported(source, package)
    return sorted(hashes.values())


def _imported(source: str, package: str) -> list[str]:
    """Return the names of modules that a source imports, or from which it imports something."""
    found: list[str] = []
    for module, names, plain in _IMPORT.findall(source):
        if not module:
            found += re.findall(r"[\w.]+", plain)
            continue
        base = importlib.util.resolve_name(module, package) if package or module[0] != "." else module.lstrip(".")
        inside = [f"{base}.{name}" for name in re.findall(r"\w+", names)]
        file = _find(base)
        is_package = file is not None and file.name == "__init__.py" and not _is_installed(file)
        modules = [name for name in inside if _find(name) is not None] if is_package else []
        found += modules or [base]
    return found


@functools.cache
def _find(name: str) -> Path | None:
    """Return the file of a module, which need not be imported, nor is; None if there is none."""
    first, *rest = name.split(".")
    if name == "__main__":
        file = getattr(sys.modules[name], "__file__", None)
        return None if file is None else Path(file)
    try:
        spec = importlib.util.find_spec(first) if first else None
    except ValueError:  # a module that was made and not imported
        return None
    if spec is None or spec.origin is None and not spec.submodule_search_locations:
        return None
    if not rest:
        return Path(str(spec.origin))
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *rest)
        for file in (path / "__init__.py", path.parent / f"{path.name}.py"):
            if file.is_file():
                return file
    return None


@functools.cache
def _is_installed(file: Path) -> bool:
    path = file.resolve()
    is_released = bool(_RELEASED.intersection(path.parts)) or any(path.is_relative_to(place) for place in _STANDARD)
    return is_released or not path.is_file()  # such as what is built into Python
