"""``Server`` runs rounds of training, averaging and tests by clients, each saved as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import seed_everything

from lightning_peft.recipes.federated.engine import flower
from lightning_peft.recipes.federated.history import History, means, read, restore_strategy, strategy_state
from lightning_peft.recipes.federated.local_model import ClientModel
from lightning_peft.recipes.federated.messages import (
    METRICS,
    arrays_of,
    discover_clients,
    payload,
    record,
    validate_replies,
)
from lightning_peft.recipes.federated.settings import Federation, to_plain

if TYPE_CHECKING:
    from flwr.app import ConfigRecord, Context, Message
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import Strategy

log = logging.getLogger(__name__)


class Server:
    """Leads a federation from its last closed round to the last one asked for.

    A client that fails, is late, or sends what is not finite or does not fit is refused by name, and the round goes on
    with the others. A round without any keeps the last state.

    Args:
        federation: Settings of the federation.
        strategy: Builds Flower's strategy of averaging.
        rounds: Number of rounds in all.
        timeout: Seconds to wait for clients, in each phase of a round.
        failed_rounds: Number of rounds in a row without any usable client that end the run.
        tell: Is called with what is reported of each round.

    Raises:
        ValueError: The folder holds other settings or more rounds, or the strategy asks for too many clients.

    Examples:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_peft.recipes.federated import Federation, Files, Server
        >>> settings = {"model": BoringModel, "data": None, "peft": lp.PEFTStrategy(lp.LoRA(rank=2, targets=["layer"]))}
        >>> federation = Federation(**settings, partition=Files(paths=["north.csv", "south.csv"]), folder="run")
        >>> Server(federation, FedAvg, rounds=2).names
        ['client_0', 'client_1']
    """

    def __init__(
        self,
        federation: Federation,
        strategy: Callable[[], Strategy],
        rounds: int = 10,
        timeout: float = 3600.0,
        failed_rounds: int = 3,
        tell: Callable[[dict[str, Any]], None] = lambda entry: None,
    ) -> None:
        if min(rounds, failed_rounds) < 1 or not timeout > 0:
            raise ValueError(f"rounds={rounds}, failed_rounds={failed_rounds}, timeout={timeout}: expected above 0.")
        self.federation, self.rounds, self.timeout, self.failed_rounds = federation, rounds, timeout, failed_rounds
        self.names, self.folder, self.tell = federation.names, Path(federation.folder), tell
        self.strategy = strategy()
        for name in ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"):
            if getattr(self.strategy, name, 0) > len(self.names):
                raise ValueError(
                    f"The strategy has {name}={getattr(self.strategy, name)} of {len(self.names)} clients."
                )
        self.site = ClientModel(federation)
        self.history = self._begin({**federation.plain(), "strategy": to_plain(strategy)})
        restore_strategy(self.strategy, self.history.strategy)

    def _begin(self, settings: dict[str, Any]) -> History:
        """Return what the folder holds; before the first round, write what the model begins with."""
        history = read(self.folder, settings)
        if history is not None and len(history.rounds) > self.rounds:
            raise ValueError(f"{self.folder} has {len(history.rounds)} rounds already, expected up to {self.rounds}.")
        if history is None:
            first = arrays_of(record(self.site.first[0]))
            history = History(settings=settings, arrays=first, local_rounds=[0] * len(self.names))
            history.write(self.folder)
        return history

    def run(self, grid: Grid) -> None:
        """Run the rounds that are left.

        Args:
            grid: Flower's way to the nodes.

        Raises:
            RuntimeError: Clients are missing at the start, or too many rounds failed in a row.
        """
        nodes = discover_clients(grid, self.names, self.timeout)
        for server_round in range(len(self.history.rounds) + 1, self.rounds + 1):
            self.round(grid, nodes, server_round)
            last = self.history.rounds[-self.failed_rounds :]
            if len(last) == self.failed_rounds and not any(entry["used"] for entry in last):
                reasons = "; ".join(f"{name}: {reason}" for name, reason in last[-1]["refused"].items())
                raise RuntimeError(
                    f"{len(last)} rounds in a row had no usable client, the last because of {reasons}. {self.folder} "
                    "keeps the state before them. Correct the cause, then run the same command."
                )

    def round(self, grid: Grid, nodes: dict[int, str], server_round: int) -> None:
        """Train, average, test and close round ``server_round``, counted from 1, with the clients by their nodes."""
        seed_everything(self.federation.seeded("server", server_round), verbose=False)  # which clients are drawn
        trained = self._train(grid, nodes, server_round)
        entry = {"round": server_round, **trained, **self._test(grid, nodes, server_round)}
        self.history.rounds.append(entry)
        self.history.strategy = strategy_state(self.strategy)
        self.history.write(self.folder)
        self.tell(entry)

    def _train(self, grid: Grid, nodes: dict[int, str], server_round: int) -> dict[str, Any]:
        """Send the global part, and take the average of what comes back."""
        history, present = self.history, SimpleNamespace(get_node_ids=lambda: list(nodes))
        asked = list(self.strategy.configure_train(server_round, record(history.arrays), self._config(False), present))
        used, refused, down, up = self._ask(grid, nodes, asked, "training")
        if used:
            self._average(server_round, list(used.values()))
            before = zip(self.names, history.local_rounds, strict=True)
            history.local_rounds = [server_round if name in used else last for name, last in before]
        else:
            log.error("Round %d had no usable client; the state stays as it was.", server_round)
        full = self.site.full_bytes * len(asked)
        sizes = {"down_bytes": down, "up_bytes": up, "full_bytes": full, "ratio": down / full if full else None}
        return {"used": list(used), "refused": refused, **sizes}

    def _test(self, grid: Grid, nodes: dict[int, str], server_round: int) -> dict[str, Any]:
        """Let clients test the new global part with the local part that goes with it."""
        config, present = (
            self._config(server_round == self.rounds),
            SimpleNamespace(get_node_ids=lambda: list(nodes)),
        )
        asked = list(self.strategy.configure_evaluate(server_round, record(self.history.arrays), config, present))
        used, refused, down, _ = self._ask(grid, nodes, asked, "test")
        metrics = {name: dict(reply.content[METRICS]) for name, reply in used.items()}
        return {"evaluation_bytes": down, "not_tested": refused, "metrics": means(metrics), "clients": metrics}

    def _config(self, last: bool) -> ConfigRecord:
        settings = {"local-rounds": self.history.local_rounds, "identity": self.site.identity, "last": last}
        return flower().app.ConfigRecord(settings)

    def _ask(
        self, grid: Grid, nodes: dict[int, str], messages: list[Message], phase: str
    ) -> tuple[dict[str, Message], dict[str, str], int, int]:
        """Return usable replies, refusals, and bytes there and back."""
        asked, sent = [nodes[message.metadata.dst_node_id] for message in messages], payload(messages)
        replies = list(grid.send_and_receive(messages, timeout=self.timeout)) if messages else []
        arrays = self.history.arrays if phase == "training" else None
        order = [name for name in self.names if name in asked]
        used, refused = validate_replies(replies, nodes, order, arrays, self.timeout)
        for name, reason in refused.items():
            log.warning("Round %d refuses the %s of %s: %s", len(self.history.rounds) + 1, phase, name, reason)
        return used, refused, sent, payload(replies)

    def _average(self, server_round: int, replies: list[Message]) -> None:
        """Take what the strategy makes of the replies, if it is finite and of the same kind."""
        made, _ = self.strategy.aggregate_train(server_round, replies)
        before, name = self.history.arrays, type(self.strategy).__name__
        after = {} if made is None else arrays_of(made)
        if {k: v.shape for k, v in after.items()} != {k: v.shape for k, v in before.items()}:
            raise RuntimeError(
                f"{name} returned {len(after)} arrays of other names or shapes than the {len(before)} sent."
            )
        if wrong := [key for key, value in after.items() if not np.isfinite(value).all()]:
            raise RuntimeError(f"{name} made NaN or infinity at {wrong[0]} of finite replies; lower its rates.")
        self.history.arrays = {key: after[key].astype(value.dtype) for key, value in before.items()}


def server_app(server: Callable[[], Server]) -> ServerApp:
    """Return Flower's app of a server, for its simulation or for ``flwr run``.

    Args:
        server: Builds the server when the app starts.

    Examples:
        >>> from lightning_peft.recipes.federated import server_app
        >>> type(server_app(lambda: Server(federation, FedAvg))).__name__  # for ``flwr run``; see ``Server``
        'ServerApp'
    """
    app = flower().serverapp.ServerApp()

    @app.main()  # type: ignore[untyped-decorator, unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        server().run(grid)

    return app
