"""Checkpoint states of a model that FSDP1 has flattened, in whole tensors; what is frozen is never gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer

from ...checkpoints.adapter_state import base_names, check_state, drop_base
from ...core.injection_record import get_record
from ...ops.sharded_tensors import full_tensor, shard_of, writes_files
from .sharded_state import own_state


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return what ``module.state_dict()`` holds besides the frozen base, without FSDP1's gathering of all."""
    state: dict[str, Any] = {}
    for name, part, without_children in _outside_units(module):
        if without_children:
            part._save_to_state_dict(state, name, True)
        else:
            part.state_dict(destination=state, prefix=name, keep_vars=True)
    drop_base(module, state)
    return state


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state in whole tensors; those that were sharded are returned on the first process alone."""
    return {k: v for k, v in ((k, _gathered(v)) for k, v in state.items()) if v is not None}


def spread_out(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with sharded tensors as DTensors, which a folder takes: each process holds a run of rows."""
    return {k: _rows(v) for k, v in state.items()}


def check_saved(module: Any, saved: Mapping[str, Any], path: Path) -> None:
    """Compare a checkpoint's tensors with a module, before anything of it is loaded."""
    if get_record(module) is not None:
        check_state(module, saved, str(path))
    expected = module_state(module)
    state = {k for k, v in expected.items() if isinstance(v, Tensor)}
    missing = sorted(state - saved.keys())
    extra = sorted(saved.keys() - state - base_names(module)) if path.is_file() else []
    if module.strict_loading and (missing or extra):
        raise ValueError(f"{path} does not fit this module: it lacks {missing[:5]} and has no place for {extra[:5]}.")


def load_module(module: nn.Module, state: dict[str, Any]) -> None:
    """Load whole tensors; each process takes its part of those that are sharded."""
    local = own_state(module, state)
    for name, part, without_children in _outside_units(module):
        values = {k.removeprefix(name): v for k, v in local.items() if k.startswith(name)}
        if without_children:
            part._load_from_state_dict(values, "", {}, False, [], [], [])
        else:
            part.load_state_dict(values, strict=False)
    if (record := get_record(module)) is not None:
        record.mark_trained()


def optimizer_state(optimizer: Optimizer, sharded: bool) -> dict[str, Any]:
    """Return the state as a single process would have it; ``sharded`` as in ``spread_out``."""
    packed = optimizer.state_dict()
    parameters = _parameters(optimizer)
    entries = packed["state"]
    for index, kinds in _kinds(parameters, entries).items():
        entry, result = entries.get(index, {}), {}
        for name, kind in kinds.items():
            if not isinstance(kind, torch.dtype):
                result[name] = kind
                continue
            parameter, shard = parameters[index], shard_of(parameters[index])
            local = entry.get(name, torch.zeros(parameter.shape, dtype=kind, device=parameter.device))
            values = shard.full(local) if shard is not None else local
            result[name] = _split(values) if sharded else values.cpu() if writes_files() else None
        entries[index] = result
    packed["state"] = {index: entries[index] for index in sorted(entries)}
    return packed


def _outside_units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield (prefix, module, whether without its children) for the largest modules that hold no FSDP1 unit."""
    if isinstance(module, FullyShardedDataParallel):
        yield from _outside_units(module.module, prefix)
    elif not any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        yield prefix, module, False
    else:
        yield prefix, module, True
        for name, child in module.named_children():
            yield from _outside_units(child, f"{prefix}{name}.")


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _kinds(parameters: list[Tensor], entries: dict[int, Any]) -> dict[int, dict[str, Any]]:
    """Return what an optimizer keeps of sharded parameters: the type of what is sharded alike, else the value.

    A process that holds nothing of a parameter has no state of it, but has to take part in the gathering.
    """
    local: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(parameters):
        if shard_of(parameter) is not None and index in entries:
            local[index] = {
                name: value.dtype if isinstance(value, Tensor) and value.shape == parameter.shape else _cpu(value)
                for name, value in entries[index].items()
            }
    if not any(shard_of(parameter) is not None for parameter in parameters):
        return {}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, local)
    merged: dict[int, dict[str, Any]] = {}
    for of_process in every:
        merged = of_process | merged
    return dict(sorted(merged.items()))


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _gathered(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if shard_of(value) is None:
        return value.detach()
    values = full_tensor(value)
    return values.cpu() if writes_files() else None


def _rows(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach() if shard_of(value) is None else _split(full_tensor(value))


def _split(values: Tensor) -> Tensor:
    mesh = init_device_mesh(values.device.type, (dist.get_world_size(),))
    return distribute_tensor(values, mesh, [Shard(0)], src_data_rank=None).clone()
