"""``changes`` lists the differences between the settings of a folder and those of this run."""

from __future__ import annotations

from typing import Any


def changes(before: Any, now: Any, name: str = "") -> list[str]:
    """Return what two plain settings differ in, by dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [text for key in keys for text in changes(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == now else [f"{name} was {before!r} and is {now!r}"]
