"""``merge_files`` merges an adapter into the files of a base, one layer at a time, without the model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.base_weight_files import BaseWeightFiles, trim_malloc
from ..checkpoints.metadata import inject_from_metadata
from ..checkpoints.reader import read_adapter_file
from ..checkpoints.safetensors_files import TensorFiles
from ..core.active_on_host import inactive
from ..core.inject import detach
from ..core.injection_record import get_record
from ..core.nonfinite import check_finite
from ..files.allocation_limit import limit_allocation
from ..files.atomic_files import new_folder
from ..files.storage import Location, check_local, is_taken
from ..structure.base_model import ADAPTERS_ATTRIBUTE
from .mergeable_adapters import mergeable_adapters


@torch.no_grad()
def merge_files(
    model: nn.Module,
    base: Location,
    adapter: Location,
    folder: Location,
    strict: bool = True,
    allow_nonfinite: bool = False,
) -> Path:
    """Write the files of a base with an adapter merged in: W' = W + update, layer by layer.

    The result is what ``merge`` makes of the loaded model, rounded to the type of the files. Memory holds the adapter
    and one adapted layer at a time; all else is copied from file to file. Of a folder, other files (index,
    configuration, tokenizer) are copied as well, but no weights in other formats, which would be those without the
    adapter.

    Args:
        model: The base's network without values (built in ``without_values()``), to know its layers; left as it was.
            The keys in the files are the names of its parameters, but for one difference at the beginning of all.
        base: A safetensors file, or a folder of shards, on this machine.
        adapter: What ``save_adapter`` wrote, by path or address, or a checkpoint of a run with PEFTStrategy.
        folder: Where to write, on this machine; must not exist yet, or be empty. It is there once it is complete.
        strict: Whether the base must be the one that the adapter was trained on.
        allow_nonfinite: Whether to merge an adapter that holds NaN or infinity.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no base or no adapter.
        FileExistsError: The folder is there and not empty.
        ValueError: A file is damaged, the adapter holds NaN or infinity, does not fit the model or belongs to another
            base, the model has values, a weight is not in the files, or base or folder is an address.
        TypeError: The adapter cannot be merged into a weight.

    Examples:
        >>> from safetensors.torch import load_file, save_file
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> save_file(model.state_dict(), "base.safetensors")
        >>> adapter = lp.save_adapter(lp.inject(model, lp.LoRA(rank=2, targets=["0"])), "adapter")
        >>> with lp.without_values():
        ...     network = nn.Sequential(nn.Linear(16, 8))
        >>> folder = lp.merge_files(network, "base.safetensors", adapter, "merged")
        >>> sorted(load_file(folder / "base.safetensors"))
        ['0.bias', '0.weight']
    """
    target, _ = (check_local(path, "merge_files reads and writes files in place") for path in (folder, base))
    _check_fresh(model, target)
    stored, weights = read_adapter_file(adapter), _base_files(model, base)
    try:
        with limit_allocation(sum(tensor.numel() for tensor in stored.state.values())):
            inject_from_metadata(model, stored.description, stored.path, strict=False)
        state, adapted = stored.state_for(model), mergeable_adapters(model)
        expected = stored.description["base"]
        if strict and expected is not None and (fingerprint := weights.fingerprint(model)) != expected:
            raise ValueError(f"{adapter} belongs to another base: fingerprint {expected}, {base} has {fingerprint}.")
        if not allow_nonfinite:
            check_finite(state, "merged")
        with new_folder(target) as copied:
            written = weights.copied(copied)
            written.write(state)  # of the base itself, trained
            for name in dict.fromkeys(name for name, *_ in adapted):
                _merge_host(name, adapted, state, written)
    finally:
        if get_record(model) is not None:
            detach(model)
    return target


def _check_fresh(model: nn.Module, target: Path) -> None:
    if is_taken(target):
        raise FileExistsError(f"{target} exists; give a folder that does not.")
    if get_record(model) is not None or not all(p.is_meta for p in model.parameters()):
        raise ValueError(
            "merge_files needs a fresh network without values: build it in lightning_peft.without_values()."
        )


def _base_files(model: nn.Module, base: Location) -> BaseWeightFiles:
    weights = BaseWeightFiles(model, TensorFiles(base))
    if weights.missing:
        raise ValueError(
            f"{base} lacks {weights.missing[0]}; it has {', '.join(weights.files.keys()[:3])}. Give the files of the "
            f"same model; where a new head was trained, merge into the loaded model, which is then written whole."
        )
    return weights


def _merge_host(name: str, adapted: Any, state: Mapping[str, Tensor], weights: BaseWeightFiles) -> None:
    """Merge the adapters of one host, whose values are read from the files, and written back into them."""
    on_host = [(host, key, adapter) for host_name, host, key, adapter in adapted if host_name == name]
    host = on_host[0][0]
    with _loaded_host(name, host, weights) as (names, unsaved):
        for _, key, adapter in on_host:
            prefix = f"{name}.{ADAPTERS_ATTRIBUTE}.{key}.".lstrip(".")
            adapter.to_empty(device="cpu")
            adapter.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            with inactive([host]):
                adapter.merge(host)
            adapter.to("meta")
        tensors = {key: value for key, value in {**host._parameters, **host._buffers}.items() if value is not None}
        for key, value in tensors.items():
            if key not in names and not (key in unsaved and torch.equal(value, unsaved[key])):
                raise ValueError(f"{name} gets a {key}, for which its files have no room; merge into the loaded model.")
        weights.write({full_name: tensors[key] for key, full_name in names.items()})
    del tensors
    trim_malloc()


@contextmanager
def _loaded_host(name: str, host: Any, weights: BaseWeightFiles) -> Iterator[tuple[dict[str, str], dict[str, Tensor]]]:
    """Context in which a host has the values of the files; gives their full names, and buffers that are in no file."""
    parameters, buffers = dict(host._parameters), dict(host._buffers)
    names = {key: f"{name}.{key}".lstrip(".") for key, tensor in (parameters | buffers).items() if tensor is not None}
    unsaved = {key: buffers[key] for key, full_name in names.items() if key in buffers and not weights.has(full_name)}
    names = {key: full_name for key, full_name in names.items() if key not in unsaved}
    try:
        host._buffers.update({key: tensor.clone() for key, tensor in unsaved.items()})
        for key, full_name in names.items():
            values = weights.read(full_name)
            if key in parameters:
                host._parameters[key] = nn.Parameter(values, requires_grad=False)
            else:
                host._buffers[key] = values
        yield names, unsaved
    finally:
        for key in host._parameters.keys() - parameters.keys():
            del host._parameters[key]
        host._parameters.update(parameters)
        host._buffers.update(buffers)
