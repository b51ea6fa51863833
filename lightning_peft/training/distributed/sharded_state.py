"""Checkpoint states between whole tensors, which every strategy reads, and the shards of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...checkpoints.adapter_state import strip_wrapper_names
from ...ops.sharded_tensors import full_tensor, global_shape, local_shard

_STATE = "state_dict."


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder to which each process wrote its part, on the meta device, by key."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # here: it takes a tenth of all imports
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        key.removeprefix(_STATE): torch.empty(entry.size, device="meta")
        for key, entry in entries.items()
        if key.startswith(_STATE) and isinstance(entry, TensorStorageMetadata)
    }


def whole_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state as one process would save it; all processes have to call it."""
    return _with_tensors(optimizer.state_dict(), lambda number, value: full_tensor(value.detach()).cpu())


def own_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state cut to this process' shards, by the order of parameters in their groups; no views."""
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    parameters = {n: p for old, new in pairs for n, p in zip(old["params"], new["params"], strict=True)}

    def cut(number: int, value: Tensor) -> Tensor:
        values, target = full_tensor(value), parameters[number]
        return (local_shard(target, values) if values.shape == global_shape(target) else values).clone()

    return _with_tensors(state, cut)


def own_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's state cut to this process' shards."""
    named = module.named_parameters(remove_duplicate=False)
    parameters = {strip_wrapper_names(name): parameter for name, parameter in named}
    values = {k: full_tensor(v) if isinstance(v, Tensor) else v for k, v in state.items()}
    return {
        k: local_shard(parameters[strip_wrapper_names(k)], v) if strip_wrapper_names(k) in parameters else v
        for k, v in values.items()
    }


def _with_tensors(state: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """Return an optimizer's state with changed tensors; ``change`` gets the parameter's number as well."""
    changed = {
        number: {key: change(number, v) if isinstance(v, Tensor) else v for key, v in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": changed}
