"""``listed`` and ``no_match``: what is said of patterns that are no list, or that match nothing in a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from .base_model import name_pattern
from .roles import ROLES

LISTING = "lightning_peft.targets(model), or lightning-peft targets --config FILE, lists what can be targeted."


def listed(patterns: Sequence[str], field: str, empty: bool = False) -> Sequence[str]:
    """Return the patterns; raise if they are a string or, unless ``empty`` is allowed, there are none."""
    if isinstance(patterns, str):
        raise TypeError(f"{field} is a list of patterns; write [{patterns!r}].")
    if not patterns and not empty:
        raise ValueError(f"{field} is empty; give globs such as ['query'], or roles: {', '.join(ROLES)}.")
    return patterns


def no_match(pattern: str, named: Iterable[str], measured: bool = True) -> set[str]:
    """Raise a ``ValueError`` that lists close names, since a pattern without a match is mostly a typo."""
    patterns = list(dict.fromkeys(map(name_pattern, named)))
    ends = [end for name in patterns if (end := name.rpartition(".")[2]) != "*"]
    known = dict.fromkeys([*ends, *patterns, *ROLES])
    close = [] if pattern in ROLES else difflib.get_close_matches(pattern, known, n=5)
    advice = f"Close names: {', '.join(close)}." if close else f"The model has: {', '.join(patterns[:40])}."
    if pattern in ROLES and not measured:
        advice = f"It was looked for by names; give example_inputs to lightning_peft.inject to measure it. {advice}"
    raise ValueError(f"{pattern!r} matches nothing in the model. {advice} Roles: {', '.join(ROLES)}. {LISTING}")
