"""``read_adapter_contents`` returns the tensors of an adapter file by host and method."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...checkpoints.reader import read_adapter_file
from ...core.method import Method, from_dict
from ...interop.import_ import split_by_host
from ...interop.peft_folder import is_peft, read_peft_folder
from ...interop.peft_format import PeftFormat
from ...interop.peft_formats import FORMATS
from ...structure.base_model import split_adapter_key


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter in a file.

    Args:
        host: Name of the adapted module.
        number: Number of the method, in the file's order.
        part: Projection of a fused host; empty if the adapter is for all of it.
        tensors: Tensors by name.
        keys: The file's keys of the tensors, by name.
        pair: A and B, if the update of the host's weight is B A.
    """

    host: str
    number: int
    part: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    pair: tuple[Tensor, Tensor] | None

    @property
    def name(self) -> str:
        """Name of the host and its part."""
        return f"{self.host}.{self.part}".strip(".")


@dataclass(frozen=True)
class AdapterContents:
    """The content of an adapter file.

    Args:
        path: Of the file or folder.
        library: Library that wrote it.
        methods: Settings of each method, with its class as ``method`` and its ``name``.
        also_train: Patterns of base parameters that trained.
        base: Fingerprint of the base, if the file knows one.
        places: The adapters.
        rest: Trained parameters of the base, and other tensors of a checkpoint, by key.
    """

    path: str
    library: str
    methods: list[dict[str, Any]]
    also_train: list[str]
    base: str | None
    places: list[StoredAdapter]
    rest: dict[str, Tensor]


def read_adapter_contents(path: str | os.PathLike[str]) -> AdapterContents:
    """Return the content of a folder of ``save_adapter`` or HF PEFT, or of a checkpoint of a run.

    Raises:
        FileNotFoundError: There is none of them.
        ValueError: A file is damaged.
    """
    if is_peft(path):
        return _read_peft(path)
    stored = read_adapter_file(path)
    methods: list[dict[str, Any]] = stored.description["methods"]
    parsed, keys_by_place, other_tensors = (
        [_method(data) for data in methods],
        dict[tuple[str, str], dict[str, str]](),
        {},
    )
    for entry, value in sorted(stored.state.items(), key=lambda item: natural_sort_key(item[0])):
        if (found := split_adapter_key(entry, [data["name"] for data in methods])) is not None:
            host, key, name = found
            keys_by_place.setdefault((host, key), {})[name] = entry
        else:
            other_tensors[entry] = value
    places = []
    for (host, key), keys in keys_by_place.items():
        tensors = {name: stored.state[entry] for name, entry in keys.items()}
        candidates = [i for i, data in enumerate(methods) if f"{key}_".startswith(f"{data['name']}_")]
        number = max(candidates, key=lambda i: len(methods[i]["name"]), default=0)
        part = key.removeprefix(methods[number]["name"]).removeprefix("_")
        places.append(StoredAdapter(host, number, part, tensors, keys, _pair(parsed[number], host, tensors)))
    also_train: list[str] = stored.description["also_train"]
    return AdapterContents(
        stored.path, "lightning_peft", methods, also_train, stored.description["base"], places, other_tensors
    )


def _method(data: Mapping[str, Any]) -> Method | None:
    """Return a method, or None if the program has not imported its class, or it is of another version."""
    try:
        return from_dict(data)
    except ValueError:
        return None


def _pair(method: Method | None, host: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    try:
        return None if method is None else method.pair_of(host, tensors)
    except KeyError:  # a tensor is missing
        return None


def _read_peft(path: str | os.PathLike[str]) -> AdapterContents:
    config, tensors = read_peft_folder(path)
    kind = config["peft_type"]
    peft_format = next((candidate for candidate in FORMATS if candidate.kind == kind), None)
    hosts, other_tensors = split_by_host(peft_format, tensors) if peft_format else ({}, tensors)
    settings = {key: value for key, value in config.items() if value not in (None, {}, [])}
    full_keys = {key.removeprefix(peft_format.prefix): key for key in tensors} if peft_format else {}
    places = []
    for host, state in sorted(hosts.items(), key=lambda item: natural_sort_key(item[0])):
        keys = {name: full_keys[f"{host}.{name}".lstrip(".")] for name in state}
        places.append(StoredAdapter(host, 0, "", state, keys, _peft_pair(peft_format, config, host, state)))
    return AdapterContents(
        str(path), "peft", [{"method": kind, "name": kind.lower(), **settings}], [], None, places, other_tensors
    )


def _peft_pair(peft_format: PeftFormat | None, config: Mapping[str, Any], host: str, tensors: dict[str, Tensor]) -> Any:
    try:
        return None if peft_format is None else peft_format.pair_of(config, host, tensors)
    except KeyError:  # a tensor or a setting is missing
        return None


def natural_sort_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]
