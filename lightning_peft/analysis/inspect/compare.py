"""``compare_adapters`` reports the differences of two adapter files as plain data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.key_prefix import align_keys
from ...structure.base_model import ADAPTERS_ATTRIBUTE
from .adapter_tensors import AdapterContents, read_adapter_contents
from .norms import Pair, json_ready, tensor_distances, total_distances, update_distances

Key = tuple[int, str, str, str]  # number of the method, host, part, tensor


@dataclass(frozen=True)
class _Side:
    """A file's tensors and low-rank updates, by keys that do not depend on the names in the file."""

    tensors: dict[Key, tuple[str, Tensor]]
    pairs: dict[Key, Pair]


def compare_adapters(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> dict[str, Any]:
    """Report the differences of two adapter files as plain data that JSON can write.

    Tensors are compared where both have them in one shape: norms, ||X - Y||, the same relative to ||X||, and the
    cosine. So are updates s B A of low rank, in the space of their ranks: many factors make the same update. Hosts may
    be called differently by an enclosing module; the methods of both are taken in their order. A figure that is no
    number, such as the cosine with zero, is None.

    Args:
        one: Folder of ``save_adapter`` or of HF PEFT, or a checkpoint of a run with PEFTStrategy.
        other: Another one.

    Returns:
        ``equal`` (whether all tensors are, to the bit), ``base`` (both fingerprints), ``settings`` that differ,
        ``only_in_one``, ``only_in_other``, ``shapes`` that differ, ``tensors``, ``all``, ``updates``, ``all_updates``.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: A file is damaged, or holds no adapter.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8)), lp.LoRA(rank=2, targets=["0"]))
        >>> before = lp.save_adapter(model, "before")
        >>> _ = nn.init.ones_(model[0].peft["lora"].b)
        >>> report = lp.compare_adapters(before, lp.save_adapter(model, "after"))
        >>> report["equal"], [row["key"] for row in report["tensors"] if row["difference"]]
        (False, ['0.peft.lora.b'])
    """
    first, second = read_adapter_contents(one), read_adapter_contents(other)
    left, right = _side(first, {}), _side(second, align_keys(_hosts(second), _hosts(first)))
    shared = [key for key in left.tensors if key in right.tensors]
    pairs = [(*left.tensors[key], right.tensors[key][1]) for key in shared]
    same_shape = [(name, a, b) for name, a, b in pairs if a.shape == b.shape]
    tensors: list[dict[str, Any]] = [{"key": name, **tensor_distances(a, b)} for name, a, b in same_shape]
    updates = _updates(left, right, [method["name"] for method in first.methods])
    unshared = ([side[key][0] for key in side if key not in set(shared)] for side in (left.tensors, right.tensors))
    return {
        "one": first.path,
        "other": second.path,
        "equal": len(shared) == len(left.tensors) == len(right.tensors) and all(_equal_bits(a, b) for _, a, b in pairs),
        "base": {"one": first.base, "other": second.base},
        "settings": json_ready(_settings(first, second)),
        **dict(zip(("only_in_one", "only_in_other"), unshared, strict=True)),
        "shapes": [
            {"key": name, "one": list(a.shape), "other": list(b.shape)} for name, a, b in pairs if a.shape != b.shape
        ],
        "tensors": tensors,
        "all": total_distances(tensors),
        "updates": updates,
        "all_updates": total_distances(updates),
    }


def _hosts(contents: AdapterContents) -> list[str]:
    """Return the paths of adapters at each host (not empty where the host is the model), and the other keys."""
    return [_adapters_path(place.host) for place in contents.places] + list(contents.rest)


def _adapters_path(host: str) -> str:
    return f"{host}.{ADAPTERS_ATTRIBUTE}".lstrip(".")


def _side(contents: AdapterContents, aligned: Mapping[str, str]) -> _Side:
    """Return a file's contents, with ``aligned`` names in place of those of ``_hosts``."""
    tensors = {(-1, aligned.get(key, key), "", ""): (key, value) for key, value in contents.rest.items()}
    pairs = dict[Key, Pair]()
    for place in contents.places:
        slot = _adapters_path(place.host)
        host = aligned.get(slot, slot).removesuffix(ADAPTERS_ATTRIBUTE).rstrip(".")
        for name, value in place.tensors.items():
            tensors[place.number, host, place.part, name] = place.keys[name], value
        if place.pair is not None:
            pairs[place.number, host, place.part, ""] = place.pair
    return _Side(tensors, pairs)


def _updates(left: _Side, right: _Side, method_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the distances of low-rank updates that both files have, of matrices of one shape."""
    return [
        {"place": ".".join(filter(None, key[1:])), "name": method_names[key[0]], **update_distances(pair, other_pair)}
        for key, pair in left.pairs.items()
        if (other_pair := right.pairs.get(key)) is not None and _matrix_sides(pair) == _matrix_sides(other_pair)
    ]


def _settings(one: AdapterContents, other: AdapterContents) -> list[dict[str, Any]]:
    differences = []
    for number in range(max(len(one.methods), len(other.methods))):
        a, b = (contents.methods[number] if number < len(contents.methods) else {} for contents in (one, other))
        for field in dict.fromkeys((*a, *b)):
            if a.get(field) != b.get(field):
                name = (a or b)["name"]
                differences.append({"name": name, "field": field, "one": a.get(field), "other": b.get(field)})
    if one.also_train != other.also_train:
        differences.append({"name": "", "field": "also_train", "one": one.also_train, "other": other.also_train})
    return differences


def _matrix_sides(pair: Pair) -> tuple[int, int]:
    return len(pair[1]), pair[0].shape[1]


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits; numbers that are none equal themselves."""
    bits = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
