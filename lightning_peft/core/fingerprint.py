"""``fingerprint``: a short digest of a base model's values, which tells whether an adapter belongs to the base."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..ops.sharded_tensors import global_shape, sample_values
from ..ops.torch_api import is_plain
from ..structure.base_model import base_modules, base_parameters
from ..structure.original_weight import original_of
from .adapted_module import adapters, method_name, replaced_names
from .method import Method

COUNT = 64  # of values of a weight
Samples = Mapping[str, tuple[tuple[int, ...], torch.Tensor]]  # by parameter: shape and some values


@dataclass(frozen=True)
class Merged:
    """What tells a base apart whose weights hold merged adapters.

    Args:
        base: Samples of the base without the adapters.
        now: Fingerprint with them.
    """

    base: Samples
    now: str | None


def fingerprint(model: nn.Module, trained: Collection[str] | None = None) -> str | None:
    """Return a short digest of the frozen base: shapes and up to 64 values of each parameter, rounded to bfloat16.

    Names do not enter, nor does the type that values are stored in; a weight that ``quantize`` changed enters by its
    original values. None for a model on the meta device. All processes of a sharded model have to call it.

    Args:
        model: Base model, adapted or not.
        trained: Names of the base parameters to leave out; those that require a gradient if not given.
    """
    if trained is None:
        trained = {name for name, parameter in base_parameters(model).items() if parameter.requires_grad}
    samples = samples_of(model, trained)
    return None if samples is None else digest(samples.values())


def samples_of(model: nn.Module, left_out: Collection[str] = ()) -> Samples | None:
    """Return what ``fingerprint`` is a digest of, for all base parameters but some; None on the meta device."""
    shapes, values, views = dict[str, tuple[int, ...]](), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    modules = {"": model, **base_modules(model)}
    for name, parameter in base_parameters(model).items():
        if name in left_out:
            continue
        owner, _, key = name.rpartition(".")
        original = original_of(modules[owner], key)
        if parameter.is_meta:
            return None
        shapes[name] = tuple(original.shape if original else global_shape(parameter))
        if original is None or original.values is None:
            views[name] = sample_values(parameter, COUNT)
        else:
            values[name] = original.values
    values |= _rounded(views)
    return {name: (shape, values[name]) for name, shape in shapes.items()}


def sample(weight: torch.Tensor) -> torch.Tensor:
    """Return up to 64 values of a weight, evenly spread, rounded to bfloat16."""
    return sample_values(weight, COUNT).bfloat16().cpu()


def _rounded(views: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by name, rounded to bfloat16, on the CPU: one copy from each device for all of a type."""
    groups = defaultdict[tuple[torch.dtype, torch.device], dict[str, torch.Tensor]](dict)
    for name, view in views.items():
        if is_plain(view):
            groups[view.dtype, view.device][name] = view
    rounded = {name: view.bfloat16().cpu() for name, view in views.items() if not is_plain(view)}
    for group in groups.values():
        joined = torch.cat(list(group.values())).bfloat16().cpu()
        rounded |= zip(group, torch.split(joined, [len(view) for view in group.values()]), strict=True)
    return rounded


def digest(samples: Iterable[tuple[tuple[int, ...], torch.Tensor]]) -> str:
    """Return the fingerprint of parameters, given the shape and the sampled values of each."""
    sha256, sampled_values = hashlib.sha256(), []
    for shape, values in samples:
        sha256.update(str(shape).encode())
        sampled_values.append(values)
    if sampled_values:
        sha256.update(torch.cat(sampled_values).view(torch.int16).numpy().tobytes())
    return sha256.hexdigest()[:16]


def trained_or_replaced_names(model: nn.Module, methods: Sequence[Method]) -> set[str]:
    """Return the names of the base parameters to leave out of a fingerprint.

    These train, or the adapters of the methods replace them during calls.
    """
    trained = {name for name, parameter in base_parameters(model).items() if parameter.requires_grad}
    names = {method.name for method in methods}
    return trained | replaced_names((host, a) for host, _, key, a in adapters(model) if method_name(key, a) in names)
