"""Base weights that no process ever holds whole: built without values, read from files where a unit needs them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...checkpoints.key_prefix import differing_prefixes
from ...core.adapted_module import adapters
from ...quantization.quantize import complete
from ...structure.base_model import ADAPTERS_ATTRIBUTE
from ...structure.quantized import original_of


@contextmanager
def without_values() -> Iterator[None]:
    """Context in which modules are built with parameters on the meta device, and buffers as they are."""
    handle = register_module_parameter_registration_hook(_emptied)
    try:
        yield
    finally:
        handle.remove()


def _emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.to("meta"), parameter.requires_grad)


class BaseWeights:
    """The weights of a model in safetensors files, one tensor at a time.

    Args:
        path: A file, or a folder of files as transformers writes them.

    Raises:
        FileNotFoundError: There is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"base_weights: {path} holds no .safetensors file; save the base model there.")
        opened: list[Any] = [safe_open(file, "pt") for file in files]  # mapped into memory, and read when asked for
        self._holders = {key: file for file in opened for key in file.keys()}  # noqa: SIM118  # not a mapping
        self._path, self._keys = path, dict[str, str]()

    def find(self, module: nn.Module) -> None:
        """Find the key of each parameter without values: its name but for one difference at the beginning of all.

        Raises:
            ValueError: A frozen parameter is not in the files, or has another shape there, or a buffer has no values.
        """
        empty = [
            name
            for name, buffer in module.named_buffers()
            if buffer.is_meta and f".{ADAPTERS_ATTRIBUTE}." not in f".{name}"
        ]
        if empty:
            raise ValueError(f"{empty[0]} is a buffer without values. Build the network in the context "
                             f"lightning_peft.without_values(), which leaves buffers as they are.")  # fmt: skip
        names = defaultdict[nn.Parameter, list[str]](list)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter.is_meta and f".{ADAPTERS_ATTRIBUTE}." not in f".{name}":
                names[parameter].append(name)
        ours, theirs = differing_prefixes((n for own in names.values() for n in own), self._holders)
        keys = {n: theirs + n.removeprefix(ours) for own in names.values() for n in own if n.startswith(ours)}
        self._keys = {name: key for name, key in keys.items() if key in self._holders}
        missing = [own[0] for p, own in names.items() if not p.requires_grad and not self._keys.keys() & set(own)]
        if missing:
            raise ValueError(f"base_weights: {self._path} lacks {len(missing)} frozen parameters: "
                             f"{', '.join(missing[:5])}. It has {', '.join(list(self._holders)[:5])}.")  # fmt: skip
        for parameter, own in names.items():
            for one in own:
                self._check_shape(one, parameter)

    def values(self, name: str) -> Tensor | None:
        """Return the values of a parameter; None if the files do not have them."""
        key = self._keys.get(name)
        return None if key is None else self._holders[key].get_tensor(key)

    def _check_shape(self, name: str, parameter: Tensor) -> None:
        key = self._keys.get(name)
        if key is not None and (shape := self._holders[key].get_slice(key).get_shape()) != list(parameter.shape):
            raise ValueError(f"base_weights: {key} has shape {shape}, the model {list(parameter.shape)}.")


@torch.no_grad()
def read_into(unit: nn.Module, name: str, weights: BaseWeights, device: torch.device) -> None:
    """Give the base parameters of a unit their values where they have none, quantized if they are to be.

    What trains and is in no file starts anew.

    Args:
        unit: Module; units further inside have their values.
        name: Of the unit.
        weights: Where to read, after ``find``.
        device: Where to put them.

    Raises:
        ValueError: A parameter trains, is in no file, and its module has no ``reset_parameters``.
    """
    for place, part in unit.named_modules(prefix=name):
        known, original = True, original_of(part)
        kind = None if original is None else original.dtype  # that quantization takes, whatever the plugin made of it
        for own, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta and f".{ADAPTERS_ATTRIBUTE}." not in f".{place}.":
                values = weights.values(f"{place}.{own}")
                known &= values is not None
                new = torch.empty(parameter.shape) if values is None else values
                _fill(parameter, new, device, kind if own == "weight" else None)
        if not known:
            start = getattr(part, "reset_parameters", None)
            if start is None:
                raise ValueError(f"{place} trains, is not in base_weights and has no reset_parameters() to start from.")
            start()
        complete(part)


@torch.no_grad()
def start_adapters(module: nn.Module, device: torch.device) -> None:
    """Give adapters that were injected into a base without values their initial values."""
    for _, _, _, adapter in adapters(module):
        empty = [tensor for tensor in (*adapter.parameters(), *adapter.buffers()) if tensor.is_meta]
        for tensor in empty:
            _fill(tensor, torch.empty(tensor.shape), device)
        if empty:
            adapter.reset_parameters()


def _fill(tensor: Tensor, values: Tensor, device: torch.device, kind: torch.dtype | None = None) -> None:
    """Give a tensor on the meta device its values; it stays the object that others hold."""
    new = values.to(device, kind or tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]
