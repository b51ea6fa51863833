"""``check_types`` compares plain data from a file with the types of a dataclass's fields."""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union


def check_types(cls: type, fields: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` if a value is none of its field's type; names without a known type pass."""
    for name, value in fields.items():
        hint = _hints(cls).get(name)
        if hint is not None and not _fits(value, hint):
            raise ValueError(f"{name} must be {_describe(hint)}, got {str(value)[:100]!r} ({type(value).__name__}).")


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError):  # of a method whose file imports types for checking alone
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    container = origin or hint
    if not isinstance(container, type):
        return True
    if issubclass(container, Mapping):
        return isinstance(value, Mapping) and _items_fit(value, arguments)
    if issubclass(container, Sequence) and container is not str:
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value if arguments)
    if container is float:
        return type(value) in (int, float) and math.isfinite(value)
    if container in (int, bool, str, types.NoneType):
        return type(value) is container
    return True


def _items_fit(value: Mapping[Any, Any], arguments: Sequence[Any]) -> bool:
    return all(_fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items() if arguments)


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
