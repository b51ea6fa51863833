"""What one adapter file holds, as plain data."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...structure.base_model import name_pattern
from .adapter_tensors import Contents, Place, read_contents
from .norms import extent, finite, norm, plain, singular_values


def inspect_adapter(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what an adapter file holds, as plain data that JSON can write.

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
    """
    held = read_contents(path)
    places, tensors = [_place(held, place) for place in held.places], _tensors(held)
    dtypes = Counter[str]()
    for row in tensors:
        dtypes[row["dtype"]] += row["parameters"]
    return {
        "path": held.path,
        "library": held.library,
        "methods": plain(held.methods),
        "also_train": held.also_train,
        "base": held.base,
        "parameters": sum(row["parameters"] for row in tensors),
        "bytes": sum(row["bytes"] for row in tensors),
        "dtypes": dict(dtypes),
        "table": _table(held),
        "ranks": _ranks(places),
        "places": places,
        "tensors": tensors,
        "warnings": [*_warnings(tensors), *_untrained(places)],
    }


def _place(held: Contents, place: Place) -> dict[str, Any]:
    method = held.methods[place.number] if held.methods else {}
    row: dict[str, Any] = {"place": place.name, "name": method.get("name", ""), "parameters": _count(place.tensors)}
    if place.pair is not None:
        values = singular_values(*place.pair)
        row |= {"rank": len(place.pair[0]), "norm": finite(norm(values)), "largest": finite(float(values[:1].sum()))}
    if "gate" in place.tensors:
        row["gates"] = [finite(value) for value in place.tensors["gate"].double().tanh().flatten().tolist()]
    return row


def _tensors(held: Contents) -> list[dict[str, Any]]:
    own = {place.keys[name]: value for place in held.places for name, value in place.tensors.items()}
    rows = []
    for key, value in (own | held.rest).items():
        wide = value.double()
        odd = {"nan": int(wide.isnan().sum()), "inf": int(wide.isinf().sum())}
        rows.append(
            {
                "key": key,
                "shape": list(value.shape),
                "dtype": str(value.dtype),
                "parameters": value.numel(),
                "bytes": value.nbytes,
                "norm": finite(norm(value)),
                "zero": not value.any(),
                **{what: count for what, count in odd.items() if count},
            }
        )
    return rows


def _table(held: Contents) -> list[dict[str, Any]]:
    """Return a row for each method, kind of layer, and shapes of tensors."""
    groups = defaultdict[tuple[Any, ...], list[tuple[str, dict[str, Tensor]]]](list)
    for place in held.places:
        shapes = tuple((name, tuple(value.shape), str(value.dtype)) for name, value in place.tensors.items())
        groups[place.number, name_pattern(place.name), shapes].append((place.name, place.tensors))
    for key, value in held.rest.items():
        groups[None, name_pattern(key), (("", tuple(value.shape), str(value.dtype)),)].append((key, {"": value}))
    rows = []
    for (number, kind, shapes), found in groups.items():
        tensors = {
            name: {
                "shape": list(shape),
                "dtype": dtype.removeprefix("torch."),
                "norm": extent(finite(norm(own[name])) for _, own in found),
            }
            for name, shape, dtype in shapes
        }
        rows.append(
            {
                "method": "" if number is None else held.methods[number]["method"],
                "name": "" if number is None else held.methods[number]["name"],
                "kind": kind if len(found) > 1 else found[0][0],
                "places": len(found),
                "parameters": sum(_count(own) for _, own in found),
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
        name: {"min": min(own), "max": max(own), "histogram": {str(r): n for r, n in sorted(Counter(own).items())}}
        for name, own in ranks.items()
    }


def _warnings(tensors: list[dict[str, Any]]) -> list[str]:
    odd = [row for row in tensors if "nan" in row or "inf" in row]
    found = [f"{row['key']} has {row.get('nan', 0)} NaN and {row.get('inf', 0)} infinite values" for row in odd]
    zero = [row["key"] for row in tensors if row["zero"] and row["parameters"]]
    more = f" and {len(zero) - 5} more" if len(zero) > 5 else ""
    return found + ([f"all zero: {', '.join(zero[:5])}{more}"] if zero else [])


def _untrained(places: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(row["name"] for row in places if "norm" in row)
    return [
        f"every update of {name!r} is zero: it was not trained"
        for name in names
        if all(row["norm"] == 0 for row in places if row["name"] == name and "norm" in row)
    ]


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in tensors.values())
