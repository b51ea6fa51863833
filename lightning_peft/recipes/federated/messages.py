"""Messages between server and clients: arrays by name, in exact bytes; validates the replies that enter an average."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_peft.recipes.federated.engine import flower

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message
    from flwr.serverapp import Grid

ARRAYS, CONFIG, METRICS, WEIGHT = "arrays", "config", "metrics", "num-examples"  # the names that Flower uses
Arrays = dict[str, np.ndarray[Any, Any]]


class InvalidReply(Exception):
    """Why a reply is not used."""


def record(state: Mapping[str, Tensor] | Mapping[str, np.ndarray[Any, Any]]) -> ArrayRecord:
    """Return a state as Flower's arrays."""
    app = flower().app
    return app.ArrayRecord({name: app.Array(np.asarray(value)) for name, value in state.items()})


def arrays_of(arrays: ArrayRecord) -> Arrays:
    """Return Flower's arrays as numpy's."""
    return {name: array.numpy() for name, array in arrays.items()}


def tensors_of(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return Flower's arrays as torch's."""
    return {name: torch.from_numpy(value.copy()) for name, value in arrays_of(arrays).items()}


def payload(messages: Iterable[Message]) -> int:
    """Return the bytes of all arrays in messages, as they are serialized."""
    records = [r for m in messages if not m.has_error() for r in m.content.array_records.values()]
    return sum(len(array.data) for arrays in records for array in arrays.values())


def discover_clients(grid: Grid, names: Sequence[str], timeout: float) -> dict[int, str]:
    """Wait for all clients; return which node is which client, in their order.

    Args:
        grid: Flower's way to the nodes.
        names: Of all clients.
        timeout: Seconds to wait.

    Raises:
        RuntimeError: Clients are missing, or two nodes are the same one.
    """
    app, end, clients, failed = flower().app, time.monotonic() + timeout, dict[int, int](), ""
    while len(set(clients.values())) < len(names) and time.monotonic() < end:
        new_nodes = [node for node in grid.get_node_ids() if node not in clients]
        asked = [app.Message(app.RecordDict(), dst_node_id=node, message_type="query") for node in new_nodes]
        for reply in grid.send_and_receive(asked, timeout=max(1.0, end - time.monotonic())) if asked else ():
            if reply.has_error():
                failed = f" The last to fail said: {reply.error.reason}"
            else:
                clients[reply.metadata.src_node_id] = int(reply.content[METRICS]["client"])
        time.sleep(0.1)
    missing = [name for number, name in enumerate(names) if number not in clients.values()]
    if missing or len(clients) != len(names):
        raise RuntimeError(
            f"Of {len(names)} clients, {', '.join(missing) or 'none'} did not answer; {len(clients)} nodes did. "
            f"Each node needs a partition-id of its own, from 0.{failed}"
        )
    return {node: names[number] for node, number in sorted(clients.items(), key=lambda item: item[1])}


def validate_replies(
    replies: Iterable[Message], nodes: Mapping[int, str], asked: Sequence[str], sent: Arrays | None, timeout: float
) -> tuple[dict[str, Message], dict[str, str]]:
    """Return the replies that may be used, in the order of clients, and why others may not, both by client.

    Args:
        replies: What came back.
        nodes: Client by node.
        asked: Clients that were asked.
        sent: The arrays that they were sent and return changed; None where they return metrics alone.
        timeout: Seconds for which the server waited.
    """
    used, refused = dict[str, "Message"](), dict[str, str]()
    for reply in replies:
        name = nodes.get(reply.metadata.src_node_id, "")
        if name not in asked or name in used or name in refused:
            continue
        try:
            check_reply(reply, sent)
            used[name] = reply
        except InvalidReply as reason:
            refused[name] = str(reason)
    late = f"no reply within {timeout:g} seconds"
    refused = {name: refused.get(name, late) for name in asked if name not in used}
    return {name: used[name] for name in asked if name in used}, refused


def check_reply(reply: Message, sent: Arrays | None) -> None:
    """Look at all that an average would take from a reply.

    Args:
        reply: Of one client.
        sent: As in ``validate_replies``.

    Raises:
        InvalidReply: It failed, is not finite, or differs from what was sent in names, shapes or types.
    """
    if reply.has_error():
        raise InvalidReply(_reason(reply.error.reason))
    records = reply.content.metric_records
    metrics = dict(records[METRICS]) if list(records) == [METRICS] else {}
    if WEIGHT not in metrics or (sent is not None and len(metrics) > 1):
        raise InvalidReply(f"its metrics are {metrics}, expected {WEIGHT!r}")
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InvalidReply(f"{name} is {value!r}, not a finite number")
    if metrics[WEIGHT] <= 0:
        raise InvalidReply(f"{WEIGHT} is {metrics[WEIGHT]!r}, not positive")
    if sent is not None:
        _check_arrays(dict(reply.content.array_records), sent)


def _check_arrays(records: dict[str, ArrayRecord], sent: Arrays) -> None:
    if list(records) != [ARRAYS]:
        raise InvalidReply(f"its reply has the array records {list(records)}, expected {ARRAYS!r} alone")
    received = records[ARRAYS]
    missing, unknown = sorted(sent.keys() - received.keys()), sorted(received.keys() - sent.keys())
    if missing or unknown:
        raise InvalidReply(f"it lacks {missing[:3]} ({len(missing)}) and adds {unknown[:3]} ({len(unknown)})")
    if list(received) != list(sent):
        raise InvalidReply("its arrays are in another order")  # by which some strategies go
    for name, expected in sent.items():
        try:
            value = received[name].numpy()
        except (ValueError, TypeError, EOFError) as error:
            raise InvalidReply(f"{name} cannot be read ({error})") from error
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise InvalidReply(f"{name} is {value.dtype} {value.shape}, expected {expected.dtype} {expected.shape}")
        if not np.isfinite(value).all():
            raise InvalidReply(f"{name} holds NaN or infinity")


def _reason(text: str) -> str:
    """Return why a client failed, without the way there."""
    if "ActorDiedError" in text or "ActorUnavailableError" in text:
        return "its process died"
    return text.strip().splitlines()[-1] if text.strip() else "an error without a reason"
