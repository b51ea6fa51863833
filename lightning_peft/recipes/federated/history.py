"""``History``: the server's state between rounds, in one file that is written as a whole, with a report in JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lightning_peft.core.adapter_folder import write_json
from lightning_peft.files.atomic_files import replace_file
from lightning_peft.recipes.federated.engine import flower
from lightning_peft.recipes.federated.messages import WEIGHT, Arrays, arrays_of, record
from lightning_peft.recipes.settings_diff import changes

STATE, REPORT, ROUNDS = "state.safetensors", "report.json", "rounds.csv"
COLUMNS = ["round", "used", "refused", "down_bytes", "up_bytes", "evaluation_bytes", "full_bytes", "ratio"]


@dataclass(kw_only=True)
class History:
    """The state of a federation after its last closed round.

    Args:
        settings: That decide the result, as plain data.
        arrays: The global part.
        local_rounds: For each client, the last round whose result was used; 0 before the first.
        rounds: What is reported of each round.
        strategy: Arrays and numbers that the strategy keeps between rounds, by place.
    """

    settings: dict[str, Any]
    arrays: Arrays
    local_rounds: list[int]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    strategy: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write all files; the state comes first, of which the others are made."""
        numbers = {key: value for key, value in self.strategy.items() if not isinstance(value, np.ndarray)}
        arrays = {f"strategy/{k}": v for k, v in self.strategy.items() if isinstance(v, np.ndarray)}
        arrays |= {f"global/{name}": value for name, value in self.arrays.items()}
        plain = {"settings": self.settings, "local_rounds": self.local_rounds, "rounds": self.rounds}
        metadata = {"state": json.dumps({**plain, "strategy": numbers})}
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / STATE, save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata))
        replace_file(folder / ROUNDS, self._table().encode())
        write_json(folder / REPORT, plain)

    def _table(self) -> str:
        metrics = sorted({name for entry in self.rounds for name in entry["metrics"]})
        kinds = ("mean", "weighted_mean")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*COLUMNS, *(f"{name}_{kind}" for name in metrics for kind in kinds)])
        for entry in self.rounds:
            row = [len(entry[c]) if c in ("used", "refused") else entry[c] for c in COLUMNS]
            writer.writerow([*row, *(entry["metrics"].get(name, {}).get(kind) for name in metrics for kind in kinds)])
        return text.getvalue()


def read(folder: Path, settings: dict[str, Any]) -> History | None:
    """Return the state in a folder; None where there is none yet.

    Args:
        folder: Of the server.
        settings: Those of now.

    Raises:
        ValueError: The state is damaged, or was begun with other settings; names them.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            plain = json.loads(file.metadata()["state"])
            arrays = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Take another folder, or put a copy of the file there."
        ) from error
    if differ := changes(plain["settings"], settings):
        raise ValueError(
            f"{folder} holds rounds with other settings: {'; '.join(differ)}. Use them again, or take another folder."
        )
    groups: dict[str, dict[str, Any]] = {"global": {}, "strategy": plain.pop("strategy")}
    for key, value in arrays.items():
        group, _, name = key.partition("/")
        groups[group][name] = value
    return History(arrays=groups["global"], strategy=groups["strategy"], **plain)


def strategy_state(strategy: Any) -> dict[str, Any]:
    """Return what a strategy keeps between rounds: momenta and the like, as arrays and numbers by place."""
    state: dict[str, Any] = {}
    for path, owner, name in _strategy_attributes(strategy):
        value = getattr(owner, name)
        if isinstance(value, (bool, int, float, str, type(None))):
            state[f"{path}/value"] = value
        elif isinstance(value, flower().app.ArrayRecord):
            state |= {f"{path}/record/{key}": array for key, array in arrays_of(value).items()}
        elif isinstance(value, dict) and all(isinstance(array, np.ndarray) for array in value.values()):
            state |= {f"{path}/dict/{key}": array for key, array in value.items()}
        elif isinstance(value, list) and all(isinstance(array, np.ndarray) for array in value):
            state |= {f"{path}/list/{key:06}": array for key, array in enumerate(value)}
    return state


def restore_strategy(strategy: Any, state: dict[str, Any]) -> None:
    """Put back what ``strategy_state`` returned."""
    for path, owner, name in list(_strategy_attributes(strategy)):
        for kind, build in _BUILDERS.items():
            prefix = f"{path}/{kind}/"
            values = {key.removeprefix(prefix): state[key] for key in sorted(state) if key.startswith(prefix)}
            if values:
                setattr(owner, name, build(values))
        if f"{path}/value" in state:
            setattr(owner, name, state[f"{path}/value"])


_BUILDERS: dict[str, Any] = {"record": record, "dict": dict, "list": lambda found: list(found.values())}


def _strategy_attributes(strategy: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (place, owner, attribute) of a strategy and of strategies inside it."""
    for name, value in list(vars(strategy).items()):
        if isinstance(value, flower().serverapp.strategy.Strategy):
            yield from _strategy_attributes(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", strategy, name


def means(by_client: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the mean of each metric over clients, each counting once, and weighted by their test rows.

    Args:
        by_client: Metrics of each client, with the number of rows.
    """
    names = sorted(set.intersection(*map(set, by_client.values())) - {WEIGHT}) if by_client else []
    rows = [metrics[WEIGHT] for metrics in by_client.values()]
    result = {}
    for name in names:
        values = [metrics[name] for metrics in by_client.values()]
        weighted = math.fsum(v * n for v, n in zip(values, rows, strict=True)) / sum(rows)
        result[name] = {"mean": math.fsum(values) / len(values), "weighted_mean": weighted}
    return result
