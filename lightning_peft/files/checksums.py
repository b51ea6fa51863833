"""Checksums of settings and tensors, by which a file shows that it was changed, or does not belong to another."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_COMPARED = ("format", "library", "base")


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain data, whatever the order and the spacing of its JSON are.

    Left out is what is compared when it is read: the format, the library, and the fingerprint of the base.
    """
    covered = {key: value for key, value in settings.items() if key not in _COMPARED}
    try:
        plain = json.loads(json.dumps(covered))  # as it is read from a file, with text for keys
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    except (TypeError, RecursionError) as error:
        raise ValueError(
            f"The settings are no plain data ({error}); the file that they are from is damaged."
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


def content_digest(settings: Mapping[str, Any], *contents: Any) -> str | None:
    """Return the SHA-256 of settings and of the tensors in nested dictionaries and lists, by their keys.

    None where tensors are spread over processes, or have no values of their own to read.
    """
    sha256 = hashlib.sha256(settings_digest(settings).encode())
    for number, content in enumerate(contents):
        for key, tensor in sorted(_tensors(content, str(number)).items()):
            if isinstance(tensor, DTensor) or tensor.is_meta or tensor.layout != torch.strided:
                return None
            sha256.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha256.update(_bytes_of(tensor))
    return sha256.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor's values in their order, without a copy where they lie in memory so."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and not tensor.is_complex()
    if is_plain and tensor.is_contiguous():
        return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())) if tensor.nbytes else b""
    flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def _tensors(content: Any, path: str) -> dict[str, Tensor]:
    """Return the tensors in nested data by their path."""
    found, waiting = dict[str, Tensor](), [(path, content)]
    for path, content in waiting:  # the list grows during the loop
        if isinstance(content, Tensor):
            found[path] = content
        elif isinstance(content, Mapping):
            waiting += [(f"{path}/{key}", value) for key, value in content.items()]
        elif isinstance(content, (list, tuple)):
            waiting += [(f"{path}/{key}", value) for key, value in enumerate(content)]
    return found
