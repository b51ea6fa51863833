"""The tensors of a file by place: what lies at which host, for which method."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...checkpoints.reader import read_adapter_file
from ...core.method import Method, from_dict
from ...interop.import_ import parted
from ...interop.peft_folder import is_peft, read_folder
from ...interop.peft_format import PeftFormat
from ...interop.peft_formats import FORMATS
from ...structure.base_model import ADAPTERS_ATTRIBUTE


@dataclass(frozen=True)
class Place:
    """One adapter.

    Args:
        host: Name of the module that it surrounds.
        number: Of the method, in the file's order.
        part: Of a fused host; empty if it is for all of it.
        tensors: By name.
        keys: What the file calls them.
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
class Contents:
    """What a file holds.

    Args:
        path: Of the file or folder.
        library: What wrote it.
        methods: Settings of each method, with its class as ``method`` and its ``name``.
        also_train: Patterns of what else trained.
        base: Fingerprint of the base, if the file knows one.
        places: Where adapters lie.
        rest: Trained parameters of the base, and what else a checkpoint holds, by key.
    """

    path: str
    library: str
    methods: list[dict[str, Any]]
    also_train: list[str]
    base: str | None
    places: list[Place]
    rest: dict[str, Tensor]


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Return what is in a folder of ``save_adapter`` or HF PEFT, or in a checkpoint of a run.

    Raises:
        FileNotFoundError: There is none of them.
        ValueError: A file is damaged.
    """
    if is_peft(path):
        return _of_peft(path)
    stored = read_adapter_file(path)
    methods: list[dict[str, Any]] = stored.description["methods"]
    known, found, rest = [_method(data) for data in methods], dict[tuple[str, str], dict[str, str]](), {}
    for entry, value in sorted(stored.state.items(), key=lambda item: natural(item[0])):
        if match := re.fullmatch(rf"(.*?)\.?\b{ADAPTERS_ATTRIBUTE}\.([^.]+)\.(.+)", entry):
            found.setdefault((match[1], match[2]), {})[match[3]] = entry
        else:
            rest[entry] = value
    places = []
    for (host, key), keys in found.items():
        tensors = {name: stored.state[entry] for name, entry in keys.items()}
        fitting = [i for i, data in enumerate(methods) if f"{key}_".startswith(f"{data['name']}_")]
        number = max(fitting, key=lambda i: len(methods[i]["name"]), default=0)
        part = key.removeprefix(methods[number]["name"]).removeprefix("_")
        places.append(Place(host, number, part, tensors, keys, _pair(known[number], host, tensors)))
    also: list[str] = stored.description["also_train"]
    return Contents(stored.path, "lightning_peft", methods, also, stored.description["base"], places, rest)


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


def _of_peft(path: str | os.PathLike[str]) -> Contents:
    config, tensors = read_folder(path)
    kind = config["peft_type"]
    family = next((one for one in FORMATS if one.kind == kind), None)
    hosts, rest = parted(family, tensors) if family else ({}, tensors)
    settings = {key: value for key, value in config.items() if value not in (None, {}, [])}
    known = {key.removeprefix(family.prefix): key for key in tensors} if family else {}
    places = []
    for host, own in sorted(hosts.items(), key=lambda item: natural(item[0])):
        keys = {name: known[f"{host}.{name}".lstrip(".")] for name in own}
        places.append(Place(host, 0, "", own, keys, _peft_pair(family, config, host, own)))
    return Contents(str(path), "peft", [{"method": kind, "name": kind.lower(), **settings}], [], None, places, rest)


def _peft_pair(family: PeftFormat | None, config: Mapping[str, Any], host: str, own: dict[str, Tensor]) -> Any:
    try:
        return None if family is None else family.pair_of(config, host, own)
    except KeyError:  # a tensor or a setting is missing
        return None


def natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
