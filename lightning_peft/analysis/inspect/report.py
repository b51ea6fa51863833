"""``inspect_adapter`` reports the content of one adapter file as plain data."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...structure.base_model import name_pattern
from .adapter_tensors import AdapterContents, StoredAdapter, read_adapter_contents
from .norms import finite_or_none, json_ready, norm, singular_values, value_range


def inspect_adapter(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Report the content of an adapter file as plain data that JSON can write.

    Beside the settings, each tensor has its norm; each update of low rank its rank, ||s B A||_F and its largest
    singular value, computed in the space of the rank. Ranks are those that are left (of AdaLoRA, not those that it
    started with). The update of DoRA is the one of its direction. A norm that is no number is None.

    Args:
        path: Folder of ``save_adapter`` or of HF PEFT, or a checkpoint of a run with PEFTStrategy.

    Returns:
        ``methods``, ``also_train``, ``base`` (its fingerprint), ``parameters``, ``bytes``, ``dtypes``, ``table`` (by
        method and kind of layer), ``ranks`` (by method), ``gates``, ``places``, ``tensors`` and ``warnings``.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: A file is damaged, or holds no adapter.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8)), lp.LoRA(rank=2, targets=["0"]))
        >>> report = lp.inspect_adapter(lp.save_adapter(model, "my-adapter"))
        >>> report["parameters"], report["bytes"], report["warnings"][1]
        (48, 192, "every update of 'lora' is zero: it was not trained")
    """
    contents = read_adapter_contents(path)
    places, tensors = [_place(contents, place) for place in contents.places], _tensors(contents)
    dtypes = Counter[str]()
    for row in tensors:
        dtypes[row["dtype"]] += row["parameters"]
    return {
        "path": contents.path,
        "library": contents.library,
        "methods": json_ready(contents.methods),
        "also_train": contents.also_train,
        "base": contents.base,
        "parameters": sum(row["parameters"] for row in tensors),
        "bytes": sum(row["bytes"] for row in tensors),
        "dtypes": dict(dtypes),
        "table": _table(contents),
        "ranks": _ranks(places),
        "places": places,
        "tensors": tensors,
        "warnings": [*_warnings(tensors), *_untrained(places)],
    }


def _place(contents: AdapterContents, place: StoredAdapter) -> dict[str, Any]:
    method = contents.methods[place.number] if contents.methods else {}
    row: dict[str, Any] = {"place": place.name, "name": method.get("name", ""), "parameters": _count(place.tensors)}
    if place.pair is not None:
        values = singular_values(*place.pair)
        row |= {
            "rank": len(place.pair[0]),
            "norm": finite_or_none(norm(values)),
            "largest": finite_or_none(float(values[:1].sum())),
        }
    if "gate" in place.tensors:
        row["gates"] = [finite_or_none(value) for value in place.tensors["gate"].double().tanh().flatten().tolist()]
    return row


def _tensors(contents: AdapterContents) -> list[dict[str, Any]]:
    adapter_tensors = {place.keys[name]: value for place in contents.places for name, value in place.tensors.items()}
    rows = []
    for key, value in (adapter_tensors | contents.rest).items():
        doubles = value.double()
        non_finite = {"nan": int(doubles.isnan().sum()), "inf": int(doubles.isinf().sum())}
        rows.append(
            {
                "key": key,
                "shape": list(value.shape),
                "dtype": str(value.dtype),
                "parameters": value.numel(),
                "bytes": value.nbytes,
                "norm": finite_or_none(norm(value)),
                "zero": not value.any(),
                **{problem: count for problem, count in non_finite.items() if count},
            }
        )
    return rows


def _table(contents: AdapterContents) -> list[dict[str, Any]]:
    """Return a row for each method, kind of layer, and shapes of tensors."""
    groups = defaultdict[tuple[Any, ...], list[tuple[str, dict[str, Tensor]]]](list)
    for place in contents.places:
        shapes = tuple((name, tuple(value.shape), str(value.dtype)) for name, value in place.tensors.items())
        groups[place.number, name_pattern(place.name), shapes].append((place.name, place.tensors))
    for key, value in contents.rest.items():
        groups[None, name_pattern(key), (("", tuple(value.shape), str(value.dtype)),)].append((key, {"": value}))
    rows = []
    for (number, kind, shapes), entries in groups.items():
        tensors = {
            name: {
                "shape": list(shape),
                "dtype": dtype.removeprefix("torch."),
                "norm": value_range(finite_or_none(norm(state[name])) for _, state in entries),
            }
            for name, shape, dtype in shapes
        }
        method = {"method": "", "name": ""} if number is None else contents.methods[number]
        rows.append(
            {
                **{field: method[field] for field in ("method", "name")},
                "kind": kind if len(entries) > 1 else entries[0][0],
                "places": len(entries),
                "parameters": sum(_count(state) for _, state in entries),
                "tensors": tensors,
            }
        )
    return rows


def _ranks(places: list[dict[str, Any]]) -> dict[str, Any]:
    ranks = defaultdict[str, list[int]](list)
    for row in places:
        if "rank" in row:
            ranks[row["name"]].append(row["rank"])
    return {
        name: {
            "min": min(values),
            "max": max(values),
            "histogram": {str(r): n for r, n in sorted(Counter(values).items())},
        }
        for name, values in ranks.items()
    }


def _warnings(tensors: list[dict[str, Any]]) -> list[str]:
    non_finite = [row for row in tensors if "nan" in row or "inf" in row]
    sentences = [
        f"{row['key']} has {row.get('nan', 0)} NaN and {row.get('inf', 0)} infinite values" for row in non_finite
    ]
    zero = [row["key"] for row in tensors if row["zero"] and row["parameters"]]
    more = f" and {len(zero) - 5} more" if len(zero) > 5 else ""
    return sentences + ([f"all zero: {', '.join(zero[:5])}{more}"] if zero else [])


def _untrained(places: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(row["name"] for row in places if "norm" in row)
    return [
        f"every update of {name!r} is zero: it was not trained"
        for name in names
        if all(row["norm"] == 0 for row in places if row["name"] == name and "norm" in row)
    ]


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in tensors.values())
