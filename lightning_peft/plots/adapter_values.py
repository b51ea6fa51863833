"""``PlotValues``: tensors of adapters that can be drawn, from a model or from the folder of an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.inspect.adapter_tensors import read_adapter_contents
from ..core.adapted_module import adapters

_STORED = {"ranks": ("e",), "gates": ("gate",), "tokens": ("prompt", "key")}  # names of tensors in adapter files


@dataclass(frozen=True)
class PlotValues:
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
    def of(cls, model: nn.Module) -> PlotValues:
        """Return the present values of a model's adapters."""
        values = cls()
        for name, host, key, adapter in adapters(model):
            if not adapter.plot_tensors:
                continue
            with torch.no_grad():
                tensors = {**adapter.state_dict(), **adapter.export_state()}
            by_kind = {kind: tensors[entry] for kind, entry in adapter.plot_tensors.items()}
            values.add(_full_name(name, adapter.part), key, by_kind, table=_embeddings(host))
        return values

    @classmethod
    def stored(cls, folder: str | os.PathLike[str]) -> PlotValues:
        """Return the values in the folder of an adapter, without the model that it belongs to."""
        contents, values = read_adapter_contents(folder), cls()
        for stored in contents.places:
            method, tensors = contents.methods[stored.number], stored.tensors
            by_kind = {
                kind: tensors[entry] for kind, entries in _STORED.items() for entry in entries if entry in tensors
            }
            values.add(stored.name, method["name"], by_kind, method.get("initial_rank"))
        return values

    def add(
        self, name: str, key: str, shown: Mapping[str, Tensor], possible: int | None = None, table: Tensor | None = None
    ) -> None:
        """Add the tensors of one adapter.

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
            ranks = values["ranks"]
            self.ranks[name] = (len(ranks), possible) if possible else (int((ranks != 0).sum()), len(ranks))
        if "gates" in values:
            self.gates[name] = values["gates"].tanh()
        if "tokens" in values:
            self.tokens[name] = values["tokens"]
            if table is not None and table.shape[-1] == values["tokens"].shape[-1]:
                self.tables[name] = table


def _full_name(name: str, part: str) -> str:
    return f"{name}.{part}".strip(".")


def _embeddings(host: Any) -> Tensor | None:
    get = getattr(host, "get_input_embeddings", None)
    weight = getattr(get() if callable(get) else None, "weight", None)
    return weight.detach() if isinstance(weight, Tensor) else None


def split_at_number(name: str) -> tuple[str, str, str]:
    """Split a dotted name at its first number: return the words before it and after it, and the number."""
    words = name.split(".")
    at = next((i for i, word in enumerate(words) if word.isdecimal()), None)
    if at is None:
        return "", name, ""
    return ".".join(words[:at]), ".".join(words[at + 1 :]) or words[max(0, at - 1)], words[at]


def shorten_names(names: Sequence[str], separator: str = ".") -> list[str]:
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
