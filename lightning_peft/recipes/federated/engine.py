"""``flower`` imports Flower on first use; ``simulate`` runs all clients on one machine (https://arxiv.org/abs/2007.14390)."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from lightning_peft.core.optional_imports import check_extra

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

_ENVIRONMENT = {  # what the user has set stays
    "FLWR_TELEMETRY_ENABLED": "0",  # nothing is told to the makers
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # no warning of what ray's next version does
    "RAY_DEDUP_LOGS_SKIP_REGEX": "ClientAppActor|A worker died",  # who failed is reported by name
}
_PARTS = ("app", "clientapp", "serverapp", "serverapp.strategy", "simulation")


def flower() -> ModuleType:
    """The package ``flwr`` with the parts that are used, imported on first use because it is an optional dependency.

    Raises:
        ImportError: If it is not installed.
    """
    check_extra("flwr", "Federated rounds need Flower", "federated")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for part in _PARTS:
        importlib.import_module(f"flwr.{part}")
    return importlib.import_module("flwr")


def simulate(server: ServerApp, client: ClientApp, clients: int, workers: int | None, gpus: float) -> None:
    """Run a server and its clients on this machine, each worker a process that serves one client at a time.

    Args:
        server: Flower's app of the server.
        client: Flower's app of a client.
        clients: Number of clients.
        workers: Number of processes; None for one on each core.
        gpus: Share of a GPU that each takes.
    """
    # Flower passes on what ray knows of actors: one that dies is started again and its client tried once more. Without,
    # it would go on taking clients, each of which fails.
    resources = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 1}
    ray = {"num_cpus": workers or os.cpu_count() or 1, "log_to_driver": False, "logging_level": "error"}
    with _quiet():
        flower().simulation.run_simulation(
            server, client, clients, backend_config={"init_args": ray, "client_resources": resources}
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Context in which Flower logs nothing: what fails in a round is reported by name, what ends a run is raised."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
