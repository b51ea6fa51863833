"""What adapters hold that can be seen: of a model, or of the folder of an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.inspect.adapter_tensors import read_contents
from ..core.adapted_module import adapters

_STORED = {"ranks": ("e",), "gates": ("gate",), "tokens": ("prompt", "key")}  # names of tensors in adapter files


@dataclass(frozen=True)
class Contents:
    """Tensors by the name of the module that they stand at.

    Args:
        ranks: How many triplets are kept, and how many there were.
        gates: tanh(gate), of shape (heads,).
        tokens: Virtual tokens, or the keys of a prefix: (length, features), or (tasks, length, features).
        tables: Input embeddings (vocabulary, features) of the modules whose virtual tokens stand among them.
    """

    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Contents:
        """Return what the adapters of a model hold now."""
        found = cls()
        for name, host, key, adapter in adapters(model):
            if not adapter.plot_tensors:
                continue
            with torch.no_grad():
                own = {**adapter.state_dict(), **adapter.export_state()}
            shown = {kind: own[entry] for kind, entry in adapter.plot_tensors.items()}
            found.add(_named(name, adapter.part), key, shown, table=_embeddings(host))
        return found

    @classmethod
    def stored(cls, folder: str | os.PathLike[str]) -> Contents:
        """Return what the folder of an adapter holds, without the model it belongs to."""
        held, found = read_contents(folder), cls()
        for place in held.places:
            method, own = held.methods[place.number], place.tensors
            shown = {kind: own[entry] for kind, entries in _STORED.items() for entry in entries if entry in own}
            found.add(place.name, method["name"], shown, method.get("initial_rank"))
        return found

    def add(
        self, name: str, key: str, shown: Mapping[str, Tensor], possible: int | None = None, table: Tensor | None = None
    ) -> None:
        """Add what one adapter shows.

        Args:
            name: Of the host.
            key: Name of the adapter, which tells several on one host apart.
            shown: Tensors by kind.
            possible: Number of triplets, where ``ranks`` holds the kept ones alone.
            table: Input embeddings of the host.
        """
        if any(name in kind for kind in (self.ranks, self.gates, self.tokens)):
            name = f"{name} ({key})".lstrip()
        values = {kind: value.detach().float().cpu() for kind, value in shown.items()}
        if "ranks" in values:
            kept = values["ranks"]
            self.ranks[name] = (len(kept), possible) if possible else (int((kept != 0).sum()), len(kept))
        if "gates" in values:
            self.gates[name] = values["gates"].tanh()
        if "tokens" in values:
            self.tokens[name] = values["tokens"]
            if table is not None and table.shape[-1] == values["tokens"].shape[-1]:
                self.tables[name] = table


def _named(name: str, part: str) -> str:
    return f"{name}.{part}".strip(".")


def _embeddings(host: Any) -> Tensor | None:
    get = getattr(host, "get_input_embeddings", None)
    weight = getattr(get() if callable(get) else None, "weight", None)
    return weight.detach() if isinstance(weight, Tensor) else None


def place(name: str) -> tuple[str, str, str]:
    """Return what stands before and after the first number in a dotted name, and the number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return "", name, ""
    return ".".join(parts[:at]), ".".join(parts[at + 1 :]) or parts[max(0, at - 1)], parts[at]


def shortened(names: Sequence[str], separator: str = ".") -> list[str]:
    """Return names without the parts that all of them begin with, and all end with; a single one stays whole."""
    rows = [name.split(separator) for name in names]
    if len(rows) < 2:
        return list(names)
    start = _common(rows)
    end = _common([row[start:][::-1] for row in rows])
    return [separator.join(row[start : len(row) - end]) or row[-1] for row in rows]


def _common(rows: Sequence[Sequence[str]]) -> int:
    def equal() -> Iterator[bool]:
        for column in zip(*rows, strict=False):
            yield len(set(column)) == 1

    return next((i for i, same in enumerate(equal()) if not same), min(map(len, rows)))
