"""Which base model an adapter belongs to, as a short digest of its values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

import torch
from torch import nn

from ..ops.sharded_tensors import global_shape
from ..structure.base_model import base_parameters
from ..structure.quantized import original_of, sample


def fingerprint(model: nn.Module, trained: Collection[str] | None = None) -> str | None:
    """Return a short digest of the frozen base: shapes and up to 64 values of each parameter, rounded to bfloat16.

    Names do not enter, nor does the type that values are stored in; of a weight that ``quantize`` changed it is the
    original that counts. None where values are not at hand (meta). Of a sharded model, all processes have to ask.

    Args:
        model: Base model, adapted or not.
        trained: Names of the base parameters to leave out; those that require a gradient if not given.
    """
    found: list[tuple[tuple[int, ...], torch.Tensor]] = []
    for name, parameter in base_parameters(model).items():
        if not (parameter.requires_grad if trained is None else name in trained):
            owner, _, key = name.rpartition(".")
            original = original_of(model.get_submodule(owner)) if key == "weight" else None
            if parameter.is_meta:
                return None
            values = sample(parameter) if original is None or original.values is None else original.values
            found.append((tuple(original.shape if original else global_shape(parameter)), values))
    return digest(found)


def digest(found: Iterable[tuple[tuple[int, ...], torch.Tensor]]) -> str:
    """Return the fingerprint of parameters, given the shape and the sample of each."""
    shapes, samples = hashlib.sha256(), []
    for shape, values in found:
        shapes.update(str(shape).encode())
        samples.append(values)
    if samples:
        shapes.update(torch.cat(samples).view(torch.int16).numpy().tobytes())
    return shapes.hexdigest()[:16]
