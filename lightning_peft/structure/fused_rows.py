"""``fused_rows`` and ``requested_rows``: rows of layers that compute query, key and value at once."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from .base_model import matches
from .layer_of import layer_of
from .read_weights import read_weight_attribute

_FUSED = ("c_attn", "attn.qkv", "qkv_proj")  # query, key and value in one weight, one below the other
_KEYS_AND_VALUES = "crossattention.c_attn"  # of GPT-2: fused, but without the query
_PART_OF_ROLE = {"attention.query": "query", "attention.key": "key", "attention.value": "value"}


class Rows(NamedTuple):
    """Rows of a layer's weight, seen as (out, in, *kernel), that compute one part of a fused layer.

    Args:
        part: ``query``, ``key`` or ``value``.
        start: The first row.
        stop: The row after the last one.
    """

    part: str
    start: int
    stop: int


# By layer: its rows, a text that says why they are no ranges, or None where the trace shows no attention.
_measured = WeakKeyDictionary[nn.Module, "list[Rows] | str | None"]()


def was_measured(host: nn.Module) -> bool:
    """Return whether a trace has looked for the rows of a layer."""
    return host in _measured


def set_measured_rows(host: nn.Module, rows: list[Rows] | str | None) -> None:
    """Remember what a trace shows of a layer: rows, why they are no ranges, or None for nothing."""
    _measured[host] = rows


def is_fused(name: str) -> bool:
    """Return whether a layer of this name computes query, key and value at once."""
    return any(matches(name, pattern) for pattern in _FUSED)


def has_parts(name: str, host: nn.Module) -> bool:
    """Return whether a role can mean rows of a layer, or a weight that its parent reads, and not its call."""
    return is_fused(name) or read_weight_attribute(type(host)) is not None


def lacks_query(name: str) -> bool:
    """Return whether a fused layer of this name computes keys and values, and no query."""
    return matches(name, _KEYS_AND_VALUES)


def fused_patterns(role: str) -> tuple[str, ...]:
    """Return globs of the fused layers that compute this role, along with others."""
    return _FUSED if role in _PART_OF_ROLE else ()


def fused_rows(host: nn.Module, name: str = "") -> list[Rows]:
    """Return the rows of query, key and value in a layer that computes them at once.

    They are those that ``measure_fused_rows`` found, else what the shape of the weight suggests.

    Raises:
        ValueError: The weight's shape does not divide into query, key and value, or their rows are no ranges.
    """
    if (measured := _measured.get(host)) is not None:
        if isinstance(measured, str):
            raise ValueError(
                f"{name or type(host).__name__} computes query, key and value at once, and {measured}; no role can "
                f"mean them yet. Target the layer as a whole by a glob, such as {name.rpartition('.')[2] or '*'!r}."
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
    if not (is_fused(name) or isinstance(host, nn.MultiheadAttention)):
        return [None]
    if any(matches(name, target) for target in targets if target not in roles):
        return [None]
    parts = {_PART_OF_ROLE.get(target) for target in targets}
    return [rows for rows in fused_rows(host, name) if rows.part in parts or "all-linear" in targets] or [None]
