"""Checksums of settings and tensors, by which a file shows that it was changed, or does not belong to another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
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
            flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            sha256.update(memoryview(flat))
    return sha256.hexdigest()


def _tensors(content: Any, path: str) -> dict[str, Tensor]:
    """Return the tensors in nested data by their path."""
    if isinstance(content, Tensor):
        return {path: content}
    items: Any = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, (list, tuple)):
        items = enumerate(content)
    return {name: tensor for key, value in items for name, tensor in _tensors(value, f"{path}/{key}").items()}
