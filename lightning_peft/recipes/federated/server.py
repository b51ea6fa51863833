"""The server: rounds of training, averaging and personal tests, each closed as a whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import seed_everything

from lightning_peft.recipes.federated.engine import flower
from lightning_peft.recipes.federated.history import History, means, read, restore_strategy, strategy_state
from lightning_peft.recipes.federated.messages import METRICS, arrays_of, payload, record, sift
from lightning_peft.recipes.federated.settings import Federation, plain
from lightning_peft.recipes.federated.site import Site

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
        settings = {**federation.plain(), "strategy": plain(strategy)}
        self.site = Site(federation)
        found = read(self.folder, settings)
        first = arrays_of(record(self.site.first[0]))
        self.history = found or History(settings=settings, arrays=first, local_rounds=[0] * len(self.names))
        if found is None:
            self.history.write(self.folder)
        if len(self.history.rounds) > rounds:
            raise ValueError(f"{self.folder} has {len(self.history.rounds)} rounds already, expected up to {rounds}.")
        restore_strategy(self.strategy, self.history.strategy)

    def run(self, grid: Grid) -> None:
        """Run the rounds that are left.

        Args:
            grid: Flower's way to the nodes.

        Raises:
            RuntimeError: Clients are missing at the start, or too many rounds failed in a row.
        """
        nodes = self.greet(grid)
        for server_round in range(len(self.history.rounds) + 1, self.rounds + 1):
            self.round(grid, nodes, server_round)
            last = self.history.rounds[-self.failed_rounds :]
            if len(last) == self.failed_rounds and not any(entry["used"] for entry in last):
                reasons = "; ".join(f"{name}: {reason}" for name, reason in last[-1]["refused"].items())
                raise RuntimeError(
                    f"{len(last)} rounds in a row had no usable client, the last because of {reasons}. {self.folder} "
                    "keeps the state before them. Correct the cause, then run the same command."
                )

    def greet(self, grid: Grid) -> dict[int, str]:
        """Wait for all clients; return which node is which client, in their order.

        Args:
            grid: Flower's way to the nodes.
        """
        end, known, failed = time.monotonic() + self.timeout, dict[int, int](), ""
        app = flower().app
        while len(set(known.values())) < len(self.names) and time.monotonic() < end:
            new = [node for node in grid.get_node_ids() if node not in known]
            asked = [app.Message(app.RecordDict(), dst_node_id=node, message_type="query") for node in new]
            for reply in grid.send_and_receive(asked, timeout=max(1.0, end - time.monotonic())) if asked else ():
                if reply.has_error():
                    failed = f" The last to fail said: {reply.error.reason}"
                else:
                    known[reply.metadata.src_node_id] = int(reply.content[METRICS]["client"])
            time.sleep(0.1)
        missing = [name for number, name in enumerate(self.names) if number not in known.values()]
        if missing or len(known) != len(self.names):
            raise RuntimeError(
                f"Of {len(self.names)} clients, {', '.join(missing) or 'none'} did not answer; {len(known)} nodes did. "
                f"Each node needs a partition-id of its own, from 0.{failed}"
            )
        return {node: self.names[number] for node, number in sorted(known.items(), key=lambda item: item[1])}

    def round(self, grid: Grid, nodes: dict[int, str], server_round: int) -> None:
        """Train, average, test and close one round.

        Args:
            grid: Flower's way to the nodes.
            nodes: Client by node.
            server_round: From 1.
        """
        now = self.history
        seed_everything(self.federation.seeded("server", server_round), verbose=False)  # which clients are drawn
        arrays, known = record(now.arrays), SimpleNamespace(get_node_ids=lambda: list(nodes))
        config = self._config(last=False)
        asked = list(self.strategy.configure_train(server_round, arrays, config, known))
        used, refused, sent, back = self._ask(grid, nodes, asked, "training")
        if used:
            self._average(server_round, list(used.values()))
            now.local_rounds = [
                server_round if n in used else r for n, r in zip(self.names, now.local_rounds, strict=True)
            ]
        else:
            log.error("Round %d had no usable client; the state stays as it was.", server_round)
        entry: dict[str, Any] = {"round": server_round, "used": list(used), "refused": refused}
        full = self.site.full_bytes * len(asked)
        entry |= {"down_bytes": sent, "up_bytes": back, "full_bytes": full, "ratio": sent / full if full else None}
        config = self._config(last=server_round == self.rounds)
        asked = list(self.strategy.configure_evaluate(server_round, record(now.arrays), config, known))
        used, refused, sent, _ = self._ask(grid, nodes, asked, "test")
        found = {name: dict(reply.content[METRICS]) for name, reply in used.items()}
        entry |= {"evaluation_bytes": sent, "not_tested": refused, "metrics": means(found), "clients": found}
        now.rounds.append(entry)
        now.strategy = strategy_state(self.strategy)
        now.write(self.folder)
        self.tell(entry)

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
        used, refused = sift(replies, nodes, order, arrays, self.timeout)
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
    """
    app = flower().serverapp.ServerApp()

    @app.main()  # type: ignore[untyped-decorator, unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        server().run(grid)

    return app
