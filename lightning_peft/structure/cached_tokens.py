"""``cached_tokens``: how many tokens of earlier calls the arguments of a call of transformers hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

_STATES = ("state", "mems")  # arguments of RWKV and XLNet that are lists of tensors, and no caches
_PLAIN = (Tensor, bool, int, float, str, list, Mapping)  # arguments that carry no state of earlier calls


def cached_tokens(host: nn.Module, call: Mapping[str, Any]) -> Any:
    """Return how many tokens the key-value cache among the arguments of a call holds; 0 without a cache.

    The cache is found by its type, so that it does not matter what a release calls the argument. The number is an
    int, or a tensor of one number for caches of a fixed size; None for a state that has read tokens and does not count
    them, as Mamba and RWKV have it.

    Args:
        host: Module that is called, for messages.
        call: Arguments by name.

    Raises:
        TypeError: An argument carries state of earlier calls and does not tell the number of their tokens.
    """
    for name, value in call.items():
        if name in _STATES and isinstance(value, list):
            return None
        if value is None or isinstance(value, _PLAIN):
            continue
        if _is_cache(value):
            return _length_of(value)
        if isinstance(value, tuple):
            if value and isinstance(value[0], tuple) and value[0]:
                return value[0][0].shape[-2]  # keys (batch, heads, tokens, size), as before there were cache classes
        elif type(value).__module__.partition(".")[0] == "transformers":
            raise TypeError(
                f"{type(host).__name__} was given a {type(value).__name__} as {name!r}, which does not say how many "
                f"tokens it holds, so that virtual tokens could enter twice; generate with use_cache=False."
            )
    return 0


def caches(values: Iterable[Any]) -> list[Any]:
    """Return the key-value caches of transformers among some values, each once."""
    package = sys.modules.get("transformers")
    found = [value for value in values if package is not None and isinstance(value, package.Cache)]
    return [cache for i, cache in enumerate(found) if not any(cache is earlier for earlier in found[:i])]


def has_fixed_size(cache: Any) -> bool:
    """Return whether a cache was made for a number of tokens."""
    return isinstance(cache, sys.modules["transformers"].StaticCache)


def _length_of(cache: Any) -> Any:
    """Return the number of tokens in a cache; None for states alone, which count none, once they have read some.

    It is that of the first layer which counts some: layers of linear attention (MiniMax) may count none beside others.
    """
    counts = False
    for layer in range(max(1, len(getattr(cache, "layers", ())))):
        with suppress(ValueError):  # of a state
            length = cache.get_seq_length(layer) if layer else cache.get_seq_length()
            counts = True
            if not isinstance(length, int) or length:
                return length
    return None if not counts and cache.has_previous_state() else 0


def _is_cache(value: Any) -> bool:
    """Return whether a value is a key-value cache; before transformers 5, some models define separate classes."""
    package = sys.modules.get("transformers")
    is_cache = package is not None and isinstance(value, package.Cache)
    return is_cache or callable(getattr(value, "get_seq_length", None))
