"""Names of the same things in two places that differ at the beginning alone: ``net.norm.bias`` and ``norm.bias``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable


def differing_prefixes(names: Iterable[str], others: Iterable[str]) -> tuple[str, str]:
    """Return the beginnings in which most of the names and the others differ; both empty if nothing ends alike."""
    by_end = defaultdict[str, list[str]](list)
    for other in others:
        for end in _ends(other):
            by_end[end].append(other.removesuffix(end))
    votes = Counter[tuple[str, str]]()
    for name in names:
        common = next((end for end in _ends(name) if end in by_end), None)
        if common is not None:
            votes.update((name.removesuffix(common), beginning) for beginning in by_end[common])
    return max(votes, key=lambda pair: votes[pair], default=("", ""))


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
