"""The client trains on its rows, sends the global state, and keeps the local state in its folder."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save

from lightning_peft.checkpoints.save_load import save_adapter
from lightning_peft.files.atomic_files import replace_file
from lightning_peft.recipes.federated.engine import flower
from lightning_peft.recipes.federated.local_model import ClientModel, State, client_model
from lightning_peft.recipes.federated.messages import ARRAYS, CONFIG, METRICS, WEIGHT, record, tensors_of
from lightning_peft.recipes.federated.settings import Federation
from lightning_peft.recipes.settings_diff import changes

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

log = logging.getLogger(__name__)
Handler = Callable[[Federation, int, "Message"], dict[str, Any]]


def client_app(federation: Federation) -> ClientApp:
    """Return Flower's app of a client, for its simulation or for ``flwr run``.

    A node is told by its ``partition-id`` which client it is: Flower's simulation sets it, a real node gets it by
    ``flower-supernode --node-config "partition-id=0"``.

    Args:
        federation: Settings of the federation.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_peft.recipes.federated import Federation, Files, client_app
        >>> settings = {"model": BoringModel, "data": None, "peft": lp.PEFTStrategy(lp.LoRA(rank=2, targets=["layer"]))}
        >>> federation = Federation(**settings, partition=Files(paths=["north.csv", "south.csv"]), folder="run")
        >>> type(client_app(federation)).__name__
        'ClientApp'
    """
    app = flower().clientapp.ClientApp()

    def serve(handler: Handler) -> Callable[[Message, Context], Message]:
        def call(message: Message, context: Context) -> Message:
            return answer(handler, federation, message, context)

        return call

    app.query()(serve(report_id))
    app.train()(serve(train))
    app.evaluate()(serve(evaluate_client))
    return app


def answer(handler: Handler, federation: Federation, message: Message, context: Context) -> Message:
    """Return the reply of a handler, or its error with the reason alone.

    Args:
        handler: What to do.
        federation: Settings of the federation.
        message: Of the server.
        context: Of the node.
    """
    app = flower().app
    try:
        client = int(context.node_config["partition-id"])
        return app.Message(app.RecordDict(handler(federation, client, message)), reply_to=message)
    except Exception as error:
        log.exception("The client failed.")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return app.Message(app.Error(code=0, reason=reason), reply_to=message)


def report_id(federation: Federation, client: int, message: Message) -> dict[str, Any]:
    """Say which client this is."""
    return {METRICS: flower().app.MetricRecord({"client": client})}


def train(federation: Federation, client: int, message: Message) -> dict[str, Any]:
    """Train for a round, from the local part of the last round in which this client took part.

    The new local part is written beside the old one, which goes once the server says that it is no longer needed: a
    round that is repeated begins as it began before.
    """
    model, config = load_client_state(federation, client, message)
    server_round, base = int(config["server-round"]), int(config["local-rounds"][client])
    home = federation.home(client)
    for path, number in local_files(home).items():
        if number != base:
            path.unlink()
    rows = model.train(client, server_round)
    local = model.state(model.local_names)
    if not_finite := [name for name, value in local.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{not_finite[0]}, which stays with the client, holds NaN or infinity after training.")
    if local:
        home.mkdir(parents=True, exist_ok=True)
        replace_file(home / f"local-{server_round:05}.safetensors", save(local))
    metrics = flower().app.MetricRecord({WEIGHT: rows})
    return {ARRAYS: record(model.state(model.global_names)), METRICS: metrics}


def evaluate_client(federation: Federation, client: int, message: Message) -> dict[str, Any]:
    """Test the local part with the new global part on the rows that this client holds out."""
    model, config = load_client_state(federation, client, message)
    rows, metrics = model.test(client)
    if config["last"]:
        save_adapter(model.module, federation.home(client) / "adapter")
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return {METRICS: flower().app.MetricRecord({WEIGHT: rows, **finite})}


def load_client_state(federation: Federation, client: int, message: Message) -> tuple[ClientModel, Any]:
    """Return the model with the state of this client and the global part of a message, and the message's settings.

    Raises:
        ValueError: This process built another model than the server, or got arrays that do not fit it.
        FileNotFoundError: The local part is gone.
    """
    model, config = client_model(federation), message.content[CONFIG]
    differ = changes(json.loads(config["identity"]), json.loads(model.identity))
    if differ:
        raise ValueError(f"The server has another model: {'; '.join(differ[:3])}. Give both the same settings.")
    received = tensors_of(message.content[ARRAYS])
    if received.keys() != set(model.global_names):
        raise ValueError(f"Got {len(received)} arrays with other names than the {len(model.global_names)} global ones.")
    model.load(received)
    model.load(read_local(federation.home(client), int(config["local-rounds"][client]), model))
    return model, config


def read_local(home: Path, number: int, model: ClientModel) -> State:
    """Return a client's local part after a round; before its first, what every client starts with."""
    if not model.local_names or number == 0:
        return model.first[1]
    path = home / f"local-{number:05}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, the local part after round {number}. Restore it, or start anew.")
    state = load(path.read_bytes())
    if state.keys() != set(model.local_names):
        raise ValueError(f"{path} holds other names than the local part of this model.")
    return state


def local_files(home: Path) -> dict[Path, int]:
    """Return the local parts in a client's folder with their rounds."""
    matches = {path: re.fullmatch(r"local-(\d+)\.safetensors", path.name) for path in sorted(home.glob("local-*"))}
    return {path: int(match[1]) for path, match in matches.items() if match}
