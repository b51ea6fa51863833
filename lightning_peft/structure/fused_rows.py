"""``fused_rows`` and ``requested_rows``: rows of layers that compute query, key and value at once."""

from __future__ import annotations

from collections.abc import Container, Sequence
from weakref import WeakKeyDictionary

from torch import nn

from .base_model import matches, matches_any
from .layer_of import layer_of
from .read_weights import read_weight_attribute
from .rows import Rows
from .structure import PART_OF_ROLE

_FUSED = ("c_attn", "attn.qkv", "qkv_proj")  # query, key and value in one weight, one below the other
_KEYS_AND_VALUES = "crossattention.c_attn"  # of GPT-2: fused, but without the query

# By layer: its rows, a text that says why they cannot be told, or None where each part is the whole output.
_measured = WeakKeyDictionary[nn.Module, "list[Rows] | str | None"]()


def set_measured_rows(host: nn.Module, rows: list[Rows] | str | None) -> None:
    """Remember what a trace shows of a layer: rows, why they cannot be told, or None where it has no parts."""
    _measured[host] = rows


def is_fused(name: str, host: nn.Module) -> bool:
    """Return whether a layer computes several of query, key and value at once, or other features beside one of them."""
    if host in _measured:
        return _measured[host] is not None
    return matches_any(name, _FUSED)


def has_parts(name: str, host: nn.Module) -> bool:
    """Return whether a role can mean rows of a layer, or a weight that its parent reads, and not its call."""
    return is_fused(name, host) or read_weight_attribute(type(host)) is not None


def lacks_query(name: str) -> bool:
    """Return whether a fused layer of this name computes keys and values, and no query."""
    return matches(name, _KEYS_AND_VALUES)


def fused_patterns(role: str) -> tuple[str, ...]:
    """Return globs of the fused layers that compute this role, along with others."""
    return _FUSED if role in PART_OF_ROLE else ()


def fused_rows(host: nn.Module, name: str = "") -> list[Rows]:
    """Return the rows of query, key and value in a layer that computes them at once.

    They are those that a trace found, else what the shape of the weight suggests.

    Raises:
        ValueError: The weight's shape does not divide into query, key and value, or their rows cannot be told.
    """
    if (measured := _measured.get(host)) is not None:
        if isinstance(measured, str):
            raise ValueError(
                f"{name or type(host).__name__} computes query, key and value at once, and {measured}; no role can "
                f"mean them. Target the layer as a whole by a glob, such as {name.rpartition('.')[2] or '*'!r}."
            )
        return measured
    rows, width, *_ = layer_of(host).shape(host)
    if lacks_query(name):
        return [Rows("key", 0, rows // 2), Rows("value", rows // 2, rows)]
    # With grouped heads there are fewer rows of keys than of queries; without a trace, queries are taken to be as wide
    # as the input.
    query = rows // 3 if rows == 3 * width else width
    keys = (rows - query) // 2
    if keys < 1 or query + 2 * keys != rows:
        raise ValueError(f"A fused layer of {rows} rows over {width} features has no query, key and value parts.")
    return [Rows("query", 0, query), Rows("key", query, query + keys), Rows("value", query + keys, rows)]


def requested_rows(name: str, host: nn.Module, targets: Sequence[str], roles: Container[str]) -> list[Rows | None]:
    """Return the rows of a layer that targets mean; None stands for the whole layer, which a glob always means.

    Args:
        name: Dotted name of the layer.
        host: The layer.
        targets: Globs and roles that selected it.
        roles: The names of roles; all other targets are globs.
    """
    if not (is_fused(name, host) or isinstance(host, nn.MultiheadAttention)):
        return [None]
    if any(matches(name, target) for target in targets if target not in roles):
        return [None]
    rows = fused_rows(host, name)
    if "all-linear" in targets:
        numbers = [number for part in rows for number in part.numbers()]
        return [*rows] if sorted(numbers) == list(range(layer_of(host).shape(host)[0])) else [None]
    parts = {PART_OF_ROLE.get(target) for target in targets}
    return [part for part in rows if part.part in parts] or [None]
