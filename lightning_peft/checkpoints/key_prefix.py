"""``align_keys``: names of the same tensors in two places that differ by a prefix: ``net.norm.bias``, ``norm.bias``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable


def align_keys(keys: Collection[str], names: Iterable[str]) -> dict[str, str]:
    """Return the keys under the prefix that ``names`` have instead: {key: aligned key}.

    The pair of prefixes is the one by which most names end like a key. Keys without the prefix are left out; where
    nothing ends alike, both prefixes are empty, and each key is aligned to itself.
    """
    keys_by_suffix = defaultdict[str, list[str]](list)
    for key in keys:
        for suffix in _suffixes(key):
            keys_by_suffix[suffix].append(key)
    votes = Counter[tuple[str, str]]()
    for name in names:
        longest = next((suffix for suffix in _suffixes(name) if suffix in keys_by_suffix), None)
        if longest is not None:
            votes.update((key.removesuffix(longest), name.removesuffix(longest)) for key in keys_by_suffix[longest])
    old, new = max(votes, key=lambda prefixes: votes[prefixes], default=("", ""))
    return {key: new + key.removeprefix(old) for key in keys if key.startswith(old)}


def _suffixes(name: str) -> list[str]:
    """Return the dotted ends of a name, the longest first."""
    words = name.split(".")
    return [".".join(words[i:]) for i in range(len(words))]
