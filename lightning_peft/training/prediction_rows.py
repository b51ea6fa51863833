"""``prediction_rows`` turns what a ``predict_step`` returned into rows of plain values, ``flat_row`` into a table's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

PROBABILITIES = "probabilities"
# Columns whose names say that a batch has many values, and what one value is called.
_SINGULAR = {"labels": "label", "answers": "answer", "texts": "text", "scores": "score", PROBABILITIES: "probability"}
PLACE = ("row", "loader")  # columns that say which row of which loader a prediction is for
_EXPECTED = "Expected a dictionary of columns, each with one entry for each row, a list of texts, or a tensor."


def prediction_rows(prediction: Any, names: Sequence[str] | None, source: str) -> list[dict[str, Any]]:
    """Return the rows of a batch's prediction, each a dictionary of values that JSON can hold.

    A list is the column ``text`` if it holds texts, else ``prediction``; so is a tensor. Probabilities of shape (rows,
    classes) become a dictionary by class name. Numbers that are not finite become None.

    Args:
        prediction: What ``predict_step`` returned.
        names: Names of the classes; their numbers stand for them where there are none, or another number of them.
        source: Whose ``predict_step`` it was, for errors.

    Raises:
        TypeError: It is neither a dictionary of columns, nor a list, nor a tensor.
        ValueError: Columns differ in length, or one has the name of the row's number.
    """
    columns = {name: _cells(name, column, names, source) for name, column in _columns(prediction, source).items()}
    lengths = {name: len(cells) for name, cells in columns.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{length} of {name!r}" for name, length in lengths.items())
        raise ValueError(f"{source}.predict_step returned {said}. {_EXPECTED}")
    if taken := [name for name in columns if name in PLACE]:
        raise ValueError(
            f"{source}.predict_step returned a column {taken[0]!r}, which numbers rows; name it otherwise."
        )
    renamed = {_column_name(name, cells): cells for name, cells in columns.items()}
    return [dict(zip(renamed, values, strict=True)) for values in zip(*renamed.values(), strict=True)]


def flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as a table holds it: a dictionary takes a column for each entry, lists are written as JSON."""
    flat = dict[str, Any]()
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{_SINGULAR.get(name, name)}_{key}": entry for key, entry in value.items()}
        else:
            flat[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return flat


def _columns(prediction: Any, source: str) -> Mapping[str, Any]:
    if isinstance(prediction, Mapping) and prediction:
        return prediction
    if isinstance(prediction, Tensor) and prediction.dim():
        return {"prediction": prediction}
    if isinstance(prediction, (list, tuple)):
        return {"text" if all(isinstance(value, str) for value in prediction) else "prediction": prediction}
    raise TypeError(f"{source}.predict_step returned {_shown(prediction)}, which cannot be written. {_EXPECTED}")


def _shown(prediction: Any) -> str:
    return "None" if prediction is None else f"a {type(prediction).__name__}"


def _cells(name: str, column: Any, names: Sequence[str] | None, source: str) -> list[Any]:
    values = column.tolist() if hasattr(column, "tolist") else column  # a tensor, or an array
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{source}.predict_step returned {_shown(column)} as {name!r}. {_EXPECTED}")
    cells = [_plain(value) for value in values]
    if name != PROBABILITIES or not cells or not isinstance(cells[0], list):
        return cells
    width = len(cells[0])
    keys = list(map(str, names)) if names is not None and len(names) == width else list(map(str, range(width)))
    return [dict(zip(keys, cell, strict=True)) for cell in cells]


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None  # what float32 tells apart
    return value


def _column_name(name: str, cells: Sequence[Any]) -> str:
    """Return a column's name in the singular where a row has one value of it."""
    return name if any(isinstance(cell, (list, dict)) for cell in cells) else _SINGULAR.get(name, name)
