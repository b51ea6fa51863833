"""In what two adapter files differ, as plain data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.key_prefix import align_keys
from ...structure.base_model import ADAPTERS_ATTRIBUTE
from .adapter_tensors import Contents, read_contents
from .norms import Pair, between, between_pairs, plain, together

Key = tuple[int, str, str, str]  # number of the method, host, part, tensor


@dataclass(frozen=True)
class _Side:
    """A file's tensors by what they are, whatever they are called there; and its updates of low rank."""

    tensors: dict[Key, tuple[str, Tensor]]
    pairs: dict[Key, Pair]


def compare_adapters(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> dict[str, Any]:
    """Return in what two adapter files differ, as plain data that JSON can write.

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
    """
    first, second = read_contents(one), read_contents(other)
    left, right = _side(first, {}), _side(second, align_keys(_hosts(second), _hosts(first)))
    shared = [key for key in left.tensors if key in right.tensors]
    pairs = [(*left.tensors[key], right.tensors[key][1]) for key in shared]
    alike = [(name, a, b) for name, a, b in pairs if a.shape == b.shape]
    tensors: list[dict[str, Any]] = [{"key": name, **between(a, b)} for name, a, b in alike]
    updates: list[dict[str, Any]] = [
        {"place": ".".join(filter(None, key[1:])), "name": first.methods[key[0]]["name"], **between_pairs(pair, same)}
        for key, pair in left.pairs.items()
        if (same := right.pairs.get(key)) is not None and _sides(pair) == _sides(same)
    ]
    lone = ([side[key][0] for key in side if key not in set(shared)] for side in (left.tensors, right.tensors))
    return {
        "one": first.path,
        "other": second.path,
        "equal": len(shared) == len(left.tensors) == len(right.tensors) and all(_same(a, b) for _, a, b in pairs),
        "base": {"one": first.base, "other": second.base},
        "settings": plain(_settings(first, second)),
        **dict(zip(("only_in_one", "only_in_other"), lone, strict=True)),
        "shapes": [
            {"key": name, "one": list(a.shape), "other": list(b.shape)} for name, a, b in pairs if a.shape != b.shape
        ],
        "tensors": tensors,
        "all": together(tensors),
        "updates": updates,
        "all_updates": together(updates),
    }


def _hosts(held: Contents) -> list[str]:
    """Return the names of hosts, with something behind them for what surrounds a whole model."""
    return [_slot(place.host) for place in held.places] + list(held.rest)


def _slot(host: str) -> str:
    return f"{host}.{ADAPTERS_ATTRIBUTE}".lstrip(".")


def _side(held: Contents, aligned: Mapping[str, str]) -> _Side:
    """Return a file's contents, with ``aligned`` names in place of those of ``_hosts``."""
    tensors = {(-1, aligned.get(key, key), "", ""): (key, value) for key, value in held.rest.items()}
    pairs = dict[Key, Pair]()
    for place in held.places:
        slot = _slot(place.host)
        host = aligned.get(slot, slot).removesuffix(ADAPTERS_ATTRIBUTE).rstrip(".")
        for name, value in place.tensors.items():
            tensors[place.number, host, place.part, name] = place.keys[name], value
        if place.pair is not None:
            pairs[place.number, host, place.part, ""] = place.pair
    return _Side(tensors, pairs)


def _settings(one: Contents, other: Contents) -> list[dict[str, Any]]:
    found = []
    for number in range(max(len(one.methods), len(other.methods))):
        a, b = (held.methods[number] if number < len(held.methods) else {} for held in (one, other))
        for field in dict.fromkeys((*a, *b)):
            if a.get(field) != b.get(field):
                name = (a or b)["name"]
                found.append({"name": name, "field": field, "one": a.get(field), "other": b.get(field)})
    if one.also_train != other.also_train:
        found.append({"name": "", "field": "also_train", "one": one.also_train, "other": other.also_train})
    return found


def _sides(pair: Pair) -> tuple[int, int]:
    return len(pair[1]), pair[0].shape[1]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits; numbers that are none equal themselves."""
    bits = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
