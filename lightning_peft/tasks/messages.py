"""Phrases of error messages: close names, quoted values, row numbers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


def close_names(name: str, known: Iterable[str]) -> str:
    """A sentence with the known names most like the given one, or with all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names)
    return f"Close names: {quoted(close)}." if close else f"Available: {quoted(names)}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the closest of names that the sentence before lists; nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def close_paths(path: Path, known: Iterable[Path]) -> str:
    """The same for a missing file or folder, among those of its own folder."""
    if not path.parent.is_dir():
        return f"Its folder {str(path.parent)!r} does not exist either."
    return close_names(path.name, (other.name for other in known))


def quoted(values: Iterable[object], limit: int = 20) -> str:
    """The values as a list in a sentence, cut after ``limit``."""
    shown = list(map(repr, values))
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return (", ".join(shown[:limit]) or "none") + more


def where(numbers: Sequence[int]) -> str:
    """The rows as an error names them, up to five."""
    shown = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"{'row' if len(numbers) == 1 else 'rows'} {shown}{more}"
