"""A tiny classifier of points, whose rows can make their client fail, and a grid without Flower's engine."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate
from torchmetrics.classification import MulticlassAccuracy

import lightning_peft as lp
from lightning_peft.recipes.federated import Federation, Files, Server, client_app
from lightning_peft.tasks.data.reading.splits import Splits
from lightning_peft.tasks.data.table_data import TableDataModule

FEATURES, CLASSES = 6, 3


class Points(LightningModule):
    """Classifies points; a row's trouble is nan, raise or the path of a file that counts how often its process died.

    Args:
        rate: Learning rate.
        pause: Seconds that each step takes, at least.
    """

    def __init__(self, rate: float = 0.1, pause: float = 0.0) -> None:
        super().__init__()
        self.rate, self.pause = rate, pause
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch, index):
        time.sleep(self.pause)
        loss = cross_entropy(self(batch["x"]), batch["labels"])
        trouble = set(batch["trouble"])
        if "raise" in trouble:
            raise ValueError("no training\ntoday")
        for path in map(Path, trouble - {"no", "nan", "raise"}):
            die(path)
        return loss * float("nan") if "nan" in trouble else loss

    def validation_step(self, batch, index):
        """Clients have no rows for it."""

    def test_step(self, batch, index):
        self.accuracy.update(self(batch["x"]), batch["labels"])
        self.log("test_accuracy", self.accuracy, batch_size=len(batch["labels"]))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.rate)


def die(count):
    """Kill this process, if it did not die twice before, which is as often as ray tries."""
    with count.open("a+b") as file:
        if file.tell() < 2:
            file.write(b".")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)


class PointsData(TableDataModule):
    """Rows of points.

    Args:
        train: File of all rows.
        batch_size: Rows per batch.
    """

    def __init__(self, train: str, batch_size: int = 8) -> None:
        super().__init__(Splits({"train": train}, {}, 0.0), None, 1, batch_size, 0)

    def encode(self, split, table):
        return [
            {"x": [float(row[f"x{i}"]) for i in range(FEATURES)], "labels": int(row["label"])}
            | {"trouble": row["trouble"]}
            for row in table.rows
        ]

    def train_dataloader(self):
        return DataLoader(self.examples("train"), batch_size=self.batch_size, shuffle=True, collate_fn=self.collate)

    def test_dataloader(self):
        return DataLoader(self.examples("test"), batch_size=self.batch_size, collate_fn=self.collate)

    def collate(self, rows):
        return {**default_collate(rows), "x": torch.tensor([row["x"] for row in rows])}


def write_points(path, rows, seed, trouble="no"):
    """Write rows that a line separates, and return the path."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator)
    labels = x[:, :CLASSES].argmax(1).tolist()
    columns = [*(f"x{i}" for i in range(FEATURES)), "label", "trouble"]
    lines = [",".join(map(str, [*values, label, trouble])) for values, label in zip(x.tolist(), labels, strict=True)]
    path.write_text("\n".join([",".join(columns), *lines]) + "\n")
    return str(path)


def points(folder, troubles=("no", "no", "no"), method=None, pause=0.0, **settings):
    """Return a federation whose clients have 20, 24, 28 ... rows of their own."""
    folder.mkdir(exist_ok=True)
    files = [write_points(folder / f"{i}.csv", 20 + 4 * i, i, trouble) for i, trouble in enumerate(troubles)]
    method = method or lp.FedPara(rank=2, personalized=True, targets=["body"])
    return Federation(
        model=partial(Points, pause=pause),
        data=partial(PointsData, files[0]),
        peft=lp.PEFTStrategy(method, also_train=["head"]),
        partition=Files(paths=files),
        folder=str(settings.pop("run", folder / "run")),
        **settings,
    )


class Wire:
    """Takes messages to clients in this process, and keeps them all.

    Args:
        app: The clients' app.
        count: Number of clients.
        change: What becomes of replies: gets client and reply, returns a reply, or None where it is lost.
    """

    def __init__(self, app, count, change=lambda client, reply: reply) -> None:
        self.app, self.count, self.change = app, count, change
        self.asked, self.replies = [], []

    def get_node_ids(self):
        return [1000 - client for client in range(self.count)]  # in no order that anybody may rely on

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in reversed(list(messages)):
            self.asked.append(message)
            client = 1000 - message.metadata.dst_node_id
            reply = self.change(client, self.app(message, context(client)))
            self.replies += [] if reply is None else [reply]
            replies += [] if reply is None else [reply]
        return replies

    def sent(self, kind):
        return [message for message in self.asked if message.metadata.message_type == kind]


def context(client):
    from flwr.app import Context, RecordDict

    return Context(run_id=1, node_id=1, node_config={"partition-id": client}, state=RecordDict(), run_config={})


def outside_of_flower():
    """Let messages be made where no Flower app runs."""
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID


def run(federation, rounds=2, change=lambda client, reply: reply, strategy=None, **settings):
    """Run rounds in this process; return the server and the wire."""
    from flwr.serverapp.strategy import FedAvg

    outside_of_flower()
    server = Server(federation, strategy or FedAvg, rounds, **settings)
    wire = Wire(client_app(federation), federation.partition.count, change)
    server.run(wire)
    return server, wire
