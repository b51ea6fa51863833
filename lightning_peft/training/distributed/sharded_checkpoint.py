"""Checkpoints that are folders: each process writes and reads its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor import empty as empty_rows

from ...ops.sharded_tensors import writes_files

_REST = "meta.pt"  # as Lightning names the file for what is no tensor of the model or an optimizer
_MODEL = "state_dict"


def write_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a Lightning checkpoint; tensors that are DTensors go to disk from where they are."""
    rest = dict(checkpoint)
    tensors: dict[str, Any] = {_MODEL: rest.pop(_MODEL)}
    states = rest.pop("optimizer_states", [])
    for number, state in enumerate(states):
        tensors[f"optimizer_{number}"] = {
            f"{index}.{name}": value
            for index, entry in state["state"].items()
            for name, value in entry.items()
            if isinstance(value, Tensor)
        }
    rest["optimizer_states"] = [{**state, "state": _without_tensors(state["state"])} for state in states]
    save(tensors, checkpoint_id=path)
    if writes_files():
        torch.save(rest, path / _REST)


def read_folder(path: Path, device: torch.device, weights_only: bool | None, with_optimizers: bool) -> dict[str, Any]:
    """Return what ``write_folder`` was given; each process reads some rows of each tensor.

    Raises:
        ValueError: Something else wrote the folder.
    """
    rest: dict[str, Any] = torch.load(path / _REST, map_location="cpu", weights_only=weights_only)
    states = rest.get("optimizer_states")
    if with_optimizers and states is None:
        raise ValueError(f"{path} was not written by FSDP1Strategy; resume under the strategy that wrote it.")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    found: dict[str, Any] = {}
    for key, entry in FileSystemReader(path).read_metadata().state_dict_metadata.items():
        if key.startswith(f"{_MODEL}.") or with_optimizers:
            found[key] = None
            if isinstance(entry, TensorStorageMetadata):
                kind = entry.properties.dtype
                found[key] = (
                    empty_rows(*entry.size, dtype=kind, device_mesh=mesh, placements=[Shard(0)])
                    if entry.size
                    else torch.empty((), dtype=kind)
                )
    load(found, checkpoint_id=path)
    rest[_MODEL] = {k.removeprefix(f"{_MODEL}."): v for k, v in found.items() if k.startswith(f"{_MODEL}.")}
    for key, value in found.items():
        if not key.startswith(f"{_MODEL}."):
            optimizer, index, name = key.split(".", 2)
            states[int(optimizer.removeprefix("optimizer_"))]["state"][int(index)][name] = value  # type: ignore[index]
    return rest


def _without_tensors(entries: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {i: {k: v for k, v in entry.items() if not isinstance(v, Tensor)} for i, entry in entries.items()}
