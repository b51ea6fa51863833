"""Merging an adapter folder into the files of a base, one layer at a time, without the model in memory."""

from __future__ import annotations

import copy
import ctypes
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import SLOT, base_parameters
from .beginnings import beginnings
from .describing import restore
from .fingerprints import digest
from .inject import beside_base, detach, injected, injection
from .merging import mergeable
from .quantized_layers import sample
from .stored import read_stored
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

    The result is what ``merge`` makes of the loaded model, rounded to the type of the files. Memory holds the adapter
    and one adapted layer at a time; all else is copied from file to file. Of a folder, other files (index,
    configuration, tokenizer) are copied as well, but no weights in other formats, which would be those without the
    adapter.

    Args:
        model: The base's network without values (built in ``without_values()``), to know its layers; left as it was.
            The keys in the files are the names of its parameters, but for one difference at the beginning of all.
        base: A safetensors file, or a folder of shards.
        adapter: What ``save_adapter`` wrote, or a checkpoint of a run with PEFTStrategy.
        folder: Where to write; must not exist yet, or be empty.
        strict: Whether the base must be the one that the adapter was trained on.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no base or no adapter.
        FileExistsError: The folder is there and not empty.
        ValueError: The adapter does not fit the model or belongs to another base, the model has values, or a weight is
            not in the files.
        TypeError: The adapter cannot be merged into a weight.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists; give a folder that does not.")
    if injection(model) is not None or not all(p.is_meta for p in model.parameters()):
        raise ValueError(
            "merge_files needs a fresh network without values: build it in lightning_peft.without_values()."
        )
    stored, weights = read_stored(adapter), _Weights(model, TensorFiles(base))
    try:
        restore(model, stored.description, stored.path, strict=False)
        state, found = stored.state_for(model), mergeable(model)
        expected = stored.description["base"]
        if strict and expected is not None and (other := weights.fingerprint(model)) != expected:
            raise ValueError(f"{adapter} belongs to another base: fingerprint {expected}, {base} has {other}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            whole = Path(temporary, target.name)
            whole.mkdir()
            written = weights.copied(whole)
            written.write(state)  # of the base itself, trained
            for name in dict.fromkeys(name for name, *_ in found):
                _merge_host(name, found, state, written)
            if target.exists():
                target.rmdir()
            whole.replace(target)
    finally:
        if injection(model) is not None:
            detach(model)
    return target


class _Weights:
    """The base parameters of a model in files; a shared one may be there under any of its names, or all.

    Args:
        model: A model without adapters.
        files: Where they are.

    Raises:
        ValueError: A parameter is not in the files, or has another shape there.
    """

    def __init__(self, model: nn.Module, files: TensorFiles) -> None:
        self.files, shared = files, defaultdict[nn.Parameter, list[str]](list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared[parameter].append(name)
        self._ours, self._theirs = beginnings((name for own in shared.values() for name in own), files.keys())
        self._known = set(files.keys())
        self._keys = {own[0]: [key for name in own for key in self._there(name)] for own in shared.values()}
        for parameter, (name, *_) in shared.items():
            self._check(name, tuple(parameter.shape))

    def read(self, name: str) -> Tensor:
        """Return the values of a parameter."""
        return self.files.read(self._keys[name][0])

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the values of parameters and buffers, as far as the base has them."""
        for name, values in state.items():
            for key in self._keys.get(name) or self._there(name):
                self.files.write(key, values)

    def copied(self, folder: Path) -> _Weights:
        """Copy the files; return the weights in the copy."""
        other = copy.copy(self)
        other.files = self.files.copied(folder)
        return other

    def fingerprint(self, model: nn.Module) -> str:
        """Return that of the base."""
        found, beside = [], beside_base(model, injected(model).methods)
        for name, parameter in base_parameters(model).items():
            if name not in beside:
                found.append((tuple(parameter.shape), sample(self.read(name)).clone()))  # a view would hold all of it
                _give_back()
        return digest(found)

    def _there(self, name: str) -> list[str]:
        key = self._theirs + name.removeprefix(self._ours)
        return [key] if name.startswith(self._ours) and key in self._known else []

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._keys[name]:
            raise ValueError(
                f"{self.files.path} lacks {name}; it has {', '.join(self.files.keys()[:3])}. Give the files of the "
                f"very model; where a new head was trained, merge into the loaded model, which is then written whole."
            )
        for key in self._keys[name]:
            if self.files.shape(key) != shape:
                raise ValueError(f"{key} has shape {self.files.shape(key)} in {self.files.path}, the model {shape}.")


def _merge_host(name: str, found: Any, state: Mapping[str, Tensor], weights: _Weights) -> None:
    """Merge the adapters of one host, which has values for that time alone."""
    own = [(host, key, adapter) for other, host, key, adapter in found if other == name]
    host, empty = own[0][0], dict(own[0][0]._parameters)
    names = {part: f"{name}.{part}".lstrip(".") for part, p in empty.items() if p is not None}
    for part, whole in names.items():
        host._parameters[part] = nn.Parameter(weights.read(whole), requires_grad=False)
    for _, key, adapter in own:
        prefix = f"{name}.{SLOT}.{key}.".lstrip(".")
        adapter.to_empty(device="cpu")
        adapter.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        adapter.merge(host)
        adapter.to("meta")
    if new := next((part for part, p in host._parameters.items() if p is not None and part not in names), None):
        raise ValueError(f"{name} gets a {new}, for which its files have no room; merge into the loaded model.")
    weights.write({whole: host._parameters[part] for part, whole in names.items()})
    host._parameters.update(empty)
    _give_back()


def _give_back() -> None:
    """Return freed memory to the system; glibc would keep it, in pieces that the next layer does not fit into."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
