"""Digests that are the keys of cached features: of a row, and of the modules that its features depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.refuse_saving import REFUSED
from ...structure.base_model import adapter_host, base_modules

_NO_SETTINGS = {
    "name_or_path",
    *REFUSED,
    *vars(nn.Module()),
}  # the mode is not: features are computed in evaluation mode


def row_digest(inputs: Any) -> bytes:
    """Return 16 bytes that are the same in each process for the same numbers, strings, lists, dicts, tensors, arrays.

    Raises:
        TypeError: Something else is in it.
    """
    text = json.dumps(inputs, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def model_digest(model: nn.Module, layer: str, called: Collection[nn.Module]) -> str:
    """Return a digest of what computes a layer's output: classes, settings, parameters and buffers, adapters included.

    Left out is what was not called and follows the layer, such as a new head. Every value counts: a sample, or values
    rounded as for the fingerprint of an adapter's base, would take one model's features for another's.

    Args:
        model: Base model, adapted or not.
        layer: Name of the layer.
        called: Modules that ran before the layer's result was there.
    """
    names = list(base_modules(model))
    end = max(position for position, name in enumerate(names) if f"{name}.".startswith(f"{layer}."))
    following = {name for name in names[end + 1 :] if model.get_submodule(name) not in called}
    digest = hashlib.sha256()
    host_of = adapter_host(model)
    for name, module in model.named_modules():
        host = host_of(name)
        if (name if host is None else host) not in following:
            digest.update(f"{name} {type(module).__qualname__} {_settings(module)}".encode())
            tensors = {**module._parameters, **module._buffers}
            _update(digest, ((key, value) for key, value in tensors.items() if value is not None))
    return digest.hexdigest()


def _settings(module: nn.Module) -> dict[str, str]:
    """Return the attributes that are plain values or functions: sizes, epsilons, numbers of heads, activations."""
    settings = {}
    for name, value in vars(module).items():
        items = value if isinstance(value, (list, tuple)) else [value]
        if name not in _NO_SETTINGS and all(isinstance(item, (bool, int, float, str)) for item in items):
            settings[name] = repr(value)
        elif hasattr(value, "__qualname__") and name not in _NO_SETTINGS:
            settings[name] = value.__qualname__
    return settings


def _update(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for key, value in tensors:
        if value.is_meta:
            raise ValueError(f"{key} has no values yet (it is on the meta device); load the weights first.")
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(_bytes(value)).hexdigest()]
    if isinstance(value, np.ndarray) and value.dtype != object:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return ["array", value.dtype.str, list(value.shape), content]
    if isinstance(value, np.generic):
        return ["array", value.dtype.str, [], value.tobytes().hex()]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(
        f"A row holds {type(value).__name__}, of which no digest is known. Let the dataset return numbers, strings, "
        "lists, dicts, tensors or arrays."
    )
