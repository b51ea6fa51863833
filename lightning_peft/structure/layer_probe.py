"""``output_scale``: measures whether a subclass of a layer of torch computes what its base class does."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .tracing.bare_copy import bare_copy

_SIDE = 24  # rows and columns of the small weights that are measured
_SIZES = {"in_features", "out_features", "num_embeddings", "embedding_dim", "in_channels", "out_channels", "training"}
_measured: dict[Any, float | str] = {}


def output_scale(host: Any, base: type[nn.Module], layer: Any) -> float:
    """Return s where host(x) = s x W^T + bias, for each x and W; s = 1 for layers that have the forward of ``base``.

    A class is measured once for each set of its settings, on a small copy with random weights on the CPU, without
    hooks: its output, and how the output changes with the weight, are compared with those of ``layer.apply``.

    Raises:
        TypeError: The class computes something else; the message says by how much.
    """
    if getattr(host, "max_norm", None) is not None:
        raise TypeError(
            f"This {type(host).__name__} renormalizes its weight (max_norm={host.max_norm}), so that what adapters add "
            f"would be cut off. Choose other targets, or set max_norm to None."
        )
    forward = inspect.unwrap(type(host).forward)
    if forward is base.forward:
        return 1.0
    settings = {k: v for k, v in vars(host).items() if type(v) in (int, float, bool, str) and k not in _SIZES}
    buffers = {k: b.item() for k, b in host._buffers.items() if b is not None and b.numel() == 1 and not b.is_meta}
    key = (forward, layer, getattr(host.weight, "dtype", None), *sorted({**settings, **buffers}.items()))
    if key not in _measured:
        try:
            with torch.random.fork_rng(devices=[]):
                _measured[key] = _measure(host, forward, layer)
        except Exception as error:  # whatever a foreign forward raises
            _measured[key] = f"cannot be called alone ({type(error).__name__}: {error})"
    if isinstance(found := _measured[key], str):
        raise TypeError(
            f"{type(host).__name__} is a subclass of {base.__name__} that {found}, so that adapters of its weight "
            f"would be wrong. Choose other targets, or teach it with lightning_peft.core.layer_of.register."
        )
    return found


@torch.no_grad()
def _measure(host: Any, forward: Any, layer: Any) -> float | str:
    """Return the scale, or what is wrong."""
    small = _small_copy(host)
    weight, bias, x = layer.read(small).clone(), layer.bias(small), _input(small, layer.read(small))
    y = forward(small, x)
    if not isinstance(y, Tensor):
        return f"returns a {type(y).__name__}"
    plain = layer.apply(small, x, weight)
    if y.shape != plain.shape:
        return f"returns the shape {tuple(y.shape)} for {tuple(plain.shape)}"
    scale = float((y.double() * plain).sum() / (plain.double() ** 2).sum()) if layer.is_embedding else 1.0
    shift = 0.0 if bias is None else bias.view(-1, *[1] * (weight.dim() - 2))
    if (off := _difference(y, scale * plain + shift)) > _tolerance(weight):
        return f"computes another output (off by {off:.0%})"
    change = torch.randn_like(weight)
    layer.write(small, weight + change)
    if _difference(forward(small, x) - y, scale * layer.apply(small, x, change)) > 10 * _tolerance(weight):
        return "answers a change of its weight by another change of its output"
    return scale


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def _tolerance(weight: Tensor) -> float:
    return 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.02


def _input(host: Any, weight: Tensor) -> Tensor:
    """Return an input for a copy: indices, features, or features with the dimensions of a kernel."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(host, nn.Embedding):
        return torch.arange(min(3, host.num_embeddings))[None]
    shape = [2, 3, weight.shape[1]]  # large values, so that what clips them is seen
    if weight.dim() > 2:
        extents = zip(weight.shape[2:], host.dilation, strict=True)
        shape = [2, weight.shape[1] * host.groups, *(size * dilation + 1 for size, dilation in extents)]
    return 3 * torch.randn(shape, generator=generator).to(weight.dtype)


def _small_copy(host: Any) -> Any:
    """Return a copy on the CPU without hooks and adapters, with random parameters and, if it can, few of them."""
    generator = torch.Generator().manual_seed(1)
    own = {name: p for name, p in host._parameters.items() if p is not None}
    sizes = list(next(iter(own.values())).shape)
    flat = isinstance(host, nn.Linear | nn.Embedding) and own.keys() <= {"weight", "bias"} and not host._buffers
    if flat and max(sizes[0], sizes[1]) > _SIDE and (getattr(host, "padding_idx", None) or 0) < _SIDE:
        sizes = [min(size, _SIDE) for size in sizes]
    memo: dict[int, Any] = {
        id(p): nn.Parameter(
            torch.randn(sizes[: p.dim()] if flat else p.shape, generator=generator).to(p.dtype), requires_grad=False
        )
        for p in own.values()
    }
    for x in [*host._buffers.values(), *vars(host).values()]:
        if isinstance(x, Tensor) and id(x) not in memo:
            memo[id(x)] = torch.ones(x.shape, dtype=x.dtype) if x.is_meta else x.detach().to("cpu", copy=True)
    small = bare_copy(host, memo).eval()
    names = ("num_embeddings", "embedding_dim") if isinstance(host, nn.Embedding) else ("out_features", "in_features")
    if flat:
        vars(small).update(zip(names, sizes, strict=False))
    return small
