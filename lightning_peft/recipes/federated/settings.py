"""``Federation``: the settings that the server and all clients share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lightning_peft.core.method import Method, to_dict
from lightning_peft.recipes.federated.partition import Partition, Shard
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.data.table_data import TableDataModule
from lightning_peft.training.callback import PEFTStrategy


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """Settings of a federation; the server and each client build what they need of them.

    Args:
        model: Builds the module. Every process draws the same weights from the seed; the base is never sent.
        data: Builds the data module, whose train file is divided.
        peft: What trains.
        partition: Which rows belong to which client.
        folder: Where the server keeps its state, and clients their local parts.
        local: Globs or roles of trained modules and parameters that stay with each client, beside what the method
            keeps local itself.
        epochs: Of a client in a round.
        test_fraction: Share of its rows that each client holds out for its own test.
        trainer: More arguments of each client's Trainer.
        seed: Of initial weights, of held-out rows, and of each client's training in each round.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_peft.recipes.federated import Federation, Files
        >>> settings = {"model": BoringModel, "data": None, "peft": lp.PEFTStrategy(lp.LoRA(rank=2, targets=["layer"]))}
        >>> federation = Federation(**settings, partition=Files(paths=["north.csv", "south.csv"]), folder="run")
        >>> federation.names, federation.home(1).as_posix()
        (['client_0', 'client_1'], 'run/clients/client_1')
    """

    model: Callable[[], LightningModule]
    data: Callable[[], TableDataModule]
    peft: PEFTStrategy
    partition: Partition
    folder: str
    local: list[str] = field(default_factory=list)
    epochs: int = 1
    test_fraction: float = 0.2
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"Got epochs={self.epochs}, expected 1 or more.")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"Got test_fraction={self.test_fraction}, expected a share between 0 and 1, such as 0.2.")

    @property
    def names(self) -> list[str]:
        """The clients, in the order of averaging."""
        return [_client(number) for number in range(self.partition.count)]

    def home(self, client: int) -> Path:
        """Return the folder of a client."""
        return Path(self.folder) / "clients" / _client(client)

    def shard(self, client: int) -> TableDataModule:
        """Return the data module of a client."""
        data = self.data()
        data.splits = Shard(data.splits, self.rows(data, client), self.test_fraction, self.seeded("rows", client))
        return data

    def rows(self, data: TableDataModule, client: int) -> Table:
        """Return all rows of a client."""
        table = data.splits.file("train")
        limit = data.splits.limits.get("train")
        return self.partition.rows(table.take(range(len(table))[:limit]), client)

    def seeded(self, *what: object) -> int:
        """Return a seed that these names alone decide."""
        text = "/".join(map(str, (self.seed, *what)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    def plain(self) -> dict[str, Any]:
        """Return the settings that decide the result, as plain data."""
        fields = {entry.name: to_plain(getattr(self, entry.name)) for entry in dataclasses.fields(self)}
        del fields["folder"]
        return fields

    def __hash__(self) -> int:
        return hash((self.folder, json.dumps(self.plain(), sort_keys=True)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Federation) and (self.folder, self.plain()) == (other.folder, other.plain())


def _client(number: int) -> str:
    return f"client_{number}"


def to_plain(value: Any) -> Any:
    """Return a setting as plain data: classes by name, with their arguments."""
    if isinstance(value, functools.partial):
        target = value.args[-1] if value.args else value.func  # jsonargparse puts the class last
        return {"class": _name(target), **{key: to_plain(item) for key, item in value.keywords.items()}}
    if isinstance(value, Method):
        return to_dict(value)
    if isinstance(value, PEFTStrategy):
        return {key: to_plain(item) for key, item in vars(value).items() if not key.startswith("_")}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            "class": _name(type(value)),
            **{f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else _name(value)


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)
