"""``hide_virtual_tokens``: outside of a backbone, a key-value cache tells how many tokens of the text it holds.

Whoever holds a cache, such as ``generate`` that goes on from one, takes its length for the tokens that need not be read
again. Virtual tokens are none of these; inside of the backbone, whose keys and masks have them, they count.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

_LENGTH, _CROP = "get_seq_length", "crop"


def show_virtual_tokens(caches: Iterable[Any]) -> None:
    """Let caches count virtual tokens, as inside of a backbone."""
    for cache in caches:
        for name in (_LENGTH, _CROP):
            vars(cache).pop(name, None)


def hide_virtual_tokens(caches: Iterable[Any], length: int) -> None:
    """Let caches leave out ``length`` virtual tokens more than they do already.

    Compiled code goes on to count them: it fills caches of its own, which nobody else reads.
    """
    if torch.compiler.is_compiling():
        return
    for cache in caches:
        before = vars(cache).get(_LENGTH)
        hidden = length + (before.args[1] if isinstance(before, functools.partial) else 0)
        vars(cache)[_LENGTH] = functools.partial(_text_length, cache, hidden)  # which copies and files can hold
        if hasattr(type(cache), _CROP):
            vars(cache)[_CROP] = functools.partial(_crop_text, cache, hidden)


def _text_length(cache: Any, hidden: int, *args: Any, **kwargs: Any) -> Any:
    """Return how many tokens of the text a cache holds."""
    length = type(cache).get_seq_length(cache, *args, **kwargs)
    return length - hidden if length > 0 else length


def _crop_text(cache: Any, hidden: int, length: int) -> None:
    """Shorten a cache to some tokens of the text; a number that is not positive removes as many at the end."""
    type(cache).crop(cache, length + hidden if length > 0 else length)
