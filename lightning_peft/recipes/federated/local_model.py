"""``ClientModel``: the adapted model of one process, which serves one client after the other."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lightning_peft.checkpoints.adapter_state import adapter_state, local_state
from lightning_peft.checkpoints.metadata import adapter_metadata
from lightning_peft.core.adapted_module import adapters
from lightning_peft.recipes.federated.settings import Federation
from lightning_peft.structure.base_model import base_parameters, matches
from lightning_peft.structure.roles import ROLES
from lightning_peft.tasks.data.table_data import TableDataModule
from lightning_peft.tasks.messages import close_names

State = dict[str, Tensor]


class ClientModel:
    """Builds the model once; then takes up the state of a client, trains or tests it, and gives the state back.

    Args:
        federation: Settings of the federation.

    Raises:
        ValueError: Nothing would travel, something that travels cannot be averaged, or a name of ``local`` is unknown.
    """

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        seed_everything(federation.seed, verbose=False)
        self.module = federation.model()
        self.module.configure_model()
        federation.peft.apply(self.module)
        state = adapter_state(self.module)
        local_names = local_state(self.module).keys() | self._kept(state)
        self.global_names = sorted(name for name in state if name not in local_names)  # some strategies go by position
        self.local_names = sorted(name for name in state if name in local_names)
        self._check({name: state[name] for name in self.global_names})
        self.first = self.state(self.global_names), self.state(self.local_names)  # before any training

    def state(self, names: list[str]) -> State:
        """Return a copy of what trains, on the CPU."""
        state = adapter_state(self.module)
        return {name: state[name].detach().cpu().clone() for name in names}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take values of what trains; nothing is changed where one does not fit.

        Raises:
            ValueError: A name is unknown or a shape differs.
        """
        target = adapter_state(self.module)
        for name, value in state.items():
            if name not in target or target[name].shape != value.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} has no place in this model.")
        for name, value in state.items():
            target[name].copy_(value)

    def train(self, client: int, server_round: int) -> int:
        """Train on a client's rows; return how many there are.

        Args:
            client: Position of the client.
            server_round: Decides the seed, with the client.
        """
        data = _shard(self.federation, client)
        seed_everything(self.federation.seeded("train", server_round, client), verbose=False)
        strategy = copy.deepcopy(self.federation.peft)
        strategy.show_summary = False
        self._trainer(max_epochs=self.federation.epochs, callbacks=[strategy]).fit(self.module, datamodule=data)
        return len(data.examples("train"))

    def test(self, client: int) -> tuple[int, dict[str, float]]:
        """Return the number of rows that a client holds out, and what the module's ``test_step`` logs on them."""
        data = _shard(self.federation, client)
        metrics = self._trainer().test(self.module, datamodule=data, verbose=False)[0]
        return len(data.examples("test")), dict(metrics)

    @property
    def identity(self) -> str:
        """What every process must have built alike, as JSON."""
        return json.dumps({**adapter_metadata(self.module), "local": self.local_names}, sort_keys=True)

    @property
    def full_bytes(self) -> int:
        """Bytes of the full weights of what is adapted or trains, as one message without adapters would send them."""
        hosts = [host for _, host, *_ in adapters(self.module)]
        sent = [p for host in hosts for p in base_parameters(host).values()]
        sent += [p for p in base_parameters(self.module).values() if p.requires_grad]
        return sum(p.numel() * p.element_size() for p in {id(p): p for p in sent}.values())

    def _trainer(self, **settings: Any) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
        fixed = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **quiet}
        return Trainer(**{**fixed, **self.federation.trainer, **settings})

    def _kept(self, state: Mapping[str, Tensor]) -> set[str]:
        """Return the names that the settings keep local."""
        prefixes = {name: list(accumulate(name.split("."), "{}.{}".format)) for name in state}
        kept = set[str]()
        for pattern in self.federation.local:
            owners = set(ROLES[pattern](self.module)) if pattern in ROLES else set[str]()
            matched = {name for name, ends in prefixes.items() if owners & {*ends} or _any_matches(ends, pattern)}
            if not matched:
                raise ValueError(
                    f"local has {pattern!r}, which matches nothing that trains. {_close_parts(pattern, state)}"
                )
            kept |= matched
        return kept

    def _check(self, shared: Mapping[str, Tensor]) -> None:
        if not shared:
            raise ValueError("Nothing would travel: all that trains is local. Shorten local, or take another method.")
        floats = (torch.float16, torch.float32, torch.float64)
        if wrong := [f"{name} ({value.dtype})" for name, value in shared.items() if value.dtype not in floats]:
            raise ValueError(
                f"A mean of {', '.join(wrong[:5])} would mean nothing, or cannot travel. Name them in local, or build "
                "the model with dtype=float32."
            )


@functools.lru_cache(maxsize=1)
def client_model(federation: Federation) -> ClientModel:
    """Return the model of this process; it is built by the first client that comes."""
    return ClientModel(federation)


@functools.lru_cache(maxsize=64)
def _shard(federation: Federation, client: int) -> TableDataModule:
    """Return a client's data, tokenised once in a process."""
    return federation.shard(client)


def _any_matches(names: Iterable[str], pattern: str) -> bool:
    return any(matches(name, pattern) for name in names)


def _close_parts(pattern: str, state: Mapping[str, Tensor]) -> str:
    return close_names(pattern, {part for name in state for part in name.split(".") if not part.isdecimal()})
