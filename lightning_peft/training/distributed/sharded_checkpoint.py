"""``write_folder``, ``read_folder``: checkpoints to which each process writes its part of each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor import empty as empty_rows

from ...ops.sharded_tensors import writes_files

_REST = "meta.pt"  # Lightning's name of the file for all but the tensors of the model and of optimizers
_MODEL = "state_dict"


def write_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a Lightning checkpoint; each process writes its part of tensors that are DTensors."""
    from torch.distributed.checkpoint.state_dict_saver import save  # here: it takes long to import

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
    """Return the checkpoint that ``write_folder`` has written; each process reads some rows of each tensor.

    Raises:
        ValueError: Something else wrote the folder.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    rest: dict[str, Any] = torch.load(path / _REST, map_location="cpu", weights_only=weights_only)
    states = rest.get("optimizer_states")
    if with_optimizers and states is None:
        raise ValueError(f"{path} was not written by FSDP1Strategy; resume under the strategy that wrote it.")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    is_model = {key: key.startswith(f"{_MODEL}.") for key in entries}
    values = {key: _empty(entry, mesh) for key, entry in entries.items() if is_model[key] or with_optimizers}
    load(values, checkpoint_id=path)
    rest[_MODEL] = {key.removeprefix(f"{_MODEL}."): value for key, value in values.items() if is_model[key]}
    for key in [key for key in values if not is_model[key]]:
        optimizer, index, name = key.split(".", 2)
        states[int(optimizer.removeprefix("optimizer_"))]["state"][int(index)][name] = values[key]  # type: ignore[index]
    return rest


def _empty(entry: Any, mesh: DeviceMesh) -> Tensor | None:
    """Return a tensor to load an entry of a folder into, of which each process holds some rows; None for other data."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if not isinstance(entry, TensorStorageMetadata):
        return None
    dtype = entry.properties.dtype
    if not entry.size:
        return torch.empty((), dtype=dtype)
    return empty_rows(*entry.size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])


def _without_tensors(entries: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {i: {k: v for k, v in entry.items() if not isinstance(v, Tensor)} for i, entry in entries.items()}
