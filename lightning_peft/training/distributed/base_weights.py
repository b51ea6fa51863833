"""``without_values`` builds networks on the meta device; ``read_into`` reads one unit's weights from files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...checkpoints.base_weight_files import BaseWeightFiles, trim_malloc
from ...checkpoints.safetensors_files import TensorFiles
from ...core.adapted_module import adapters
from ...quantization.quantize import quantize_late
from ...structure.base_model import adapter_host, base_modules, stored_parameter
from ...structure.original_weight import original_of


@contextmanager
def without_values() -> Iterator[None]:
    """Context in which modules are built with parameters on the meta device, and buffers as they are.

    Examples:
        >>> with lp.without_values():
        ...     model = nn.Linear(1000, 1000)
        >>> model.weight.device  # a shape without memory
        device(type='meta')
    """
    handle = register_module_parameter_registration_hook(_to_meta)
    try:
        yield
    finally:
        handle.remove()


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def find_base_weights(module: nn.Module, path: str | os.PathLike[str]) -> BaseWeightFiles:
    """Return the files that hold the values of a module's base parameters, which are on the meta device.

    Args:
        module: A module, adapted or not.
        path: A safetensors file, or a folder of files as transformers writes them.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: A frozen parameter is not in the files, or has another shape there, or a buffer has no values.
    """
    host_of = adapter_host(module)
    for name, buffer in module.named_buffers():
        if buffer.is_meta and host_of(name) is None:
            raise ValueError(f"{name} is a buffer without values. Build the network in the context "
                             f"lightning_peft.without_values(), which leaves buffers as they are.")  # fmt: skip
    weights = BaseWeightFiles(module, TensorFiles(path))
    missing = [name for name in weights.missing if not stored_parameter(module, name).requires_grad]
    if missing:
        raise ValueError(f"base_weights: {path} lacks {len(missing)} frozen parameters: {', '.join(missing[:5])}. "
                         f"It has {', '.join(weights.files.keys()[:5])}.")  # fmt: skip
    return weights


@torch.no_grad()
def read_into(unit: nn.Module, name: str, weights: BaseWeightFiles, device: torch.device) -> None:
    """Read the base parameters of a unit that are on the meta device, and quantize them if their layer is quantized.

    A parameter that trains and is in no file is initialized by its module.

    Args:
        unit: Module; units further inside have their values.
        name: Name of the unit.
        weights: Files of the base.
        device: Device to put the values on.

    Raises:
        ValueError: A parameter trains, is in no file, and its module has no ``reset_parameters``.
    """
    trim_malloc()  # of the unit before, which is sharded by now
    prefix = f"{name}." if name else ""
    for module_name, module in [(name, unit), *((prefix + key, part) for key, part in base_modules(unit).items())]:
        complete = True
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                stored = weights.has(f"{module_name}.{key}")
                complete &= stored
                values = weights.read(f"{module_name}.{key}") if stored else torch.empty(parameter.shape)
                original = original_of(module, key)  # quantized from its type, whatever the plugin made
                dtype = None if original is None else original.dtype_before_casts or original.dtype
                _fill(parameter, values, device, dtype)
        if not complete:
            _reset(module_name, module)
        quantize_late(module)


def _reset(name: str, module: Any) -> None:
    if not callable(getattr(module, "reset_parameters", None)):
        raise ValueError(f"{name} trains, is not in base_weights and has no reset_parameters() to start from.")
    module.reset_parameters()


@torch.no_grad()
def start_adapters(module: nn.Module, device: torch.device) -> None:
    """Give adapters that were injected into a base without values their initial values."""
    for _, _, _, adapter in adapters(module):
        empty = [tensor for tensor in (*adapter.parameters(), *adapter.buffers()) if tensor.is_meta]
        for tensor in empty:
            _fill(tensor, torch.empty(tensor.shape), device)
        if empty:
            adapter.reset_parameters()


def _fill(tensor: Tensor, values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Give a tensor on the meta device its values; it stays the same object, to which other modules may refer."""
    new = values.to(device, dtype or tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]
