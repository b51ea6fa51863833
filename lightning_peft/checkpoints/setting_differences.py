"""``setting_differences`` and ``check_also_train`` say in what a file and a model differ, each with both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..core.method import Method, from_dict, to_dict
from ..structure.selection import select_parameters

_ABSENT = object()


def setting_differences(methods: Sequence[Method], description: Mapping[str, Any], source: str) -> list[str]:
    """Return a sentence part for each setting in which the methods of a model differ from those of a file.

    Args:
        methods: Of the model.
        description: Of the file, as ``adapter_metadata`` wrote it.
        source: What to call the file.
    """
    here = [to_dict(method) for method in methods]
    stored = [to_dict(from_dict(data)) for data in description["methods"]]
    classes_here, classes_stored = ([str(data["method"]) for data in side] for side in (here, stored))
    if classes_here != classes_stored:
        return [f"the method is {', '.join(classes_stored)} in {source} and {', '.join(classes_here)} here"]
    found = []
    for data, other in zip(stored, here, strict=True):
        for field in [*data, *(field for field in other if field not in data)]:
            if (old := data.get(field, _ABSENT)) != (new := other.get(field, _ABSENT)):
                found.append(f"{field} of {data['method']} is {_shown(old)} in {source} and {_shown(new)} here")
    return found


def check_also_train(model: nn.Module, given: Sequence[str], stored: Sequence[str], source: str) -> None:
    """Raise a ``ValueError`` if the patterns of a file mean other base parameters than those of a model."""
    if list(given) == list(stored) or _parameters(model, given) == _parameters(model, stored):
        return
    raise ValueError(
        f"also_train is {list(stored)} in {source} and {list(given)} here, so that other parameters of the base train. "
        f"Give also_train={list(stored)} to go on, or start a new run."
    )


def _parameters(model: nn.Module, patterns: Sequence[str]) -> list[str] | None:
    try:
        return select_parameters(model, patterns)
    except ValueError:  # what a file names need not be in this model
        return None


def _shown(value: Any) -> str:
    return "not set" if value is _ABSENT else repr(value)
