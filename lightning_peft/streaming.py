"""Merging an adapter folder into the files of a base, one layer at a time, without the model in memory."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import SLOT, base_parameters
from .checkpoint import adapter_state, check_state, clean, unpacked
from .describing import restore
from .files import aligned
from .fingerprints import digest
from .folders import read_adapter
from .inject import detach, injection
from .merging import mergeable
from .quantized_layers import sample
from .tensor_files import TensorFiles


@torch.no_grad()
def merge_files(
    model: nn.Module,
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    strict: bool = True,
) -> Path:
    """Write the files of a base with an adapter merged in: W' = W + update, layer by layer.

    The result is what ``merge`` makes of the loaded model, rounded once. Memory holds the adapter and one adapted layer
    at a time; all else is copied from file to file. A folder's other files (index, configuration) are copied as well.

    Args:
        model: The base's network without values (built in ``without_values()``), to know its layers; left as it was.
        base: A safetensors file, or a folder of shards; its keys are the names of the model's parameters.
        adapter: What ``save_adapter`` wrote.
        folder: Where to write; must not exist yet.
        strict: Whether the base must be the one that the adapter was trained on.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no base or no adapter.
        FileExistsError: The folder exists.
        ValueError: The adapter does not fit the model or belongs to another base, the model has values, or a weight is
            not in the files.
        TypeError: The adapter cannot be merged into a weight, or starts from the weight (DoRA, PiSSA, OLoRA).
    """
    files, target = TensorFiles(base), Path(folder)
    if target.exists():
        raise FileExistsError(f"{target} exists; give a folder that does not.")
    if injection(model) is not None or not all(p.is_meta for p in model.parameters()):
        raise ValueError(
            "merge_files needs a fresh network without values: build it in lightning_peft.without_values()."
        )
    config, packed = read_adapter(adapter)
    try:
        restore(model, config, str(adapter), strict=False)
        state = _checked(model, packed, str(adapter))
        found = mergeable(model)
        _check_files(model, files, str(base))
        if strict and config["base"] is not None and (other := _fingerprint(model, files)) != config["base"]:
            raise ValueError(f"{adapter} belongs to another base: fingerprint {config['base']}, {base} has {other}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            whole = Path(temporary, target.name)
            whole.mkdir()
            written = files.copied(whole)
            for key in state.keys() & set(written.keys()):  # of the base itself, trained
                written.write(key, state[key])
            for name in dict.fromkeys(name for name, *_ in found):
                _merge_host(name, found, state, written)
            whole.replace(target)
    finally:
        if injection(model) is not None:
            detach(model)
    return target


def _checked(model: nn.Module, packed: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    names = {clean(key): value for key, value in adapter_state(model, packed=True).items()}
    state = unpacked(model, aligned(packed, names))
    check_state(model, state, source)
    return state


def _check_files(model: nn.Module, files: TensorFiles, base: str) -> None:
    known = set(files.keys())
    for name, parameter in base_parameters(model).items():
        if name not in known:
            raise ValueError(
                f"{base} lacks {name}; it has {', '.join(files.keys()[:3])}. Build the model that it is of."
            )
        if files.shape(name) != tuple(parameter.shape):
            raise ValueError(f"{name} has shape {files.shape(name)} in {base}, the model {tuple(parameter.shape)}.")


def _fingerprint(model: nn.Module, files: TensorFiles) -> str:
    found = []
    for name, parameter in base_parameters(model).items():
        if not parameter.requires_grad:
            found.append((tuple(parameter.shape), sample(files.read(name)).clone()))  # a view would hold all of it
            _give_back()
    return digest(found)


def _merge_host(name: str, found: Any, state: Mapping[str, Tensor], files: TensorFiles) -> None:
    """Merge the adapters of one host, which has values for that time alone."""
    own = [(host, key, adapter) for other, host, key, adapter in found if other == name]
    host, empty = own[0][0], dict(own[0][0]._parameters)
    keys = {part: f"{name}.{part}".lstrip(".") for part, p in empty.items() if p is not None}
    for part, key in keys.items():
        host._parameters[part] = nn.Parameter(files.read(key), requires_grad=False)
    for _, key, adapter in own:
        prefix = f"{name}.{SLOT}.{key}.".lstrip(".")
        adapter.to_empty(device="cpu")
        adapter.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        adapter.merge(host)
        adapter.to("meta")
    for part, key in keys.items():
        files.write(key, host._parameters[part])
    host._parameters.update(empty)
    _give_back()


def _give_back() -> None:
    """Return freed memory to the system; glibc would keep it, in pieces that the next layer does not fit into."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
