"""``is_norm``: whether a module normalizes its input, measured on a small copy; no name is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .base_model import holds_adapters
from .tracing.bare_copy import bare_copy
from .tracing.hollow_twin import twin_runs

_WIDTH = 8  # of the input of a norm whose one parameter scales all features
_LARGE = 8.0  # size of inputs beside which the constant that keeps norms from dividing by zero does not matter
_measured: dict[Any, bool] = {}


def is_norm(module: Any) -> bool:
    """Return whether a module does not care how large its input is, f(4 x) = f(x), and has vectors as parameters.

    It has no children, and nothing but vectors.
    This is so for LayerNorm, RMSNorm, GroupNorm and InstanceNorm, whoever wrote them, and not for a BatchNorm, which
    normalizes by statistics of its own. Modules of one class and size are measured once.
    """
    own = [p for p in module._parameters.values() if p is not None]
    inside = [name for name, child in module._modules.items() if child is not None and not holds_adapters(module, name)]
    if inside or not own or any(p.dim() != 1 for p in own):
        return False
    key = (getattr(type(module), "_host_class", type(module)), *(p.numel() for p in own))
    if key not in _measured:
        _measured[key] = _normalizes(module, own)
    return _measured[key]


@torch.no_grad()
def _normalizes(module: Any, own: list[nn.Parameter]) -> bool:
    with twin_runs():
        memo: dict[int, Any] = {id(p): nn.Parameter(torch.rand(p.shape) + 0.5, requires_grad=False) for p in own}
        for x in [*module._buffers.values(), *vars(module).values()]:
            if isinstance(x, Tensor):
                memo[id(x)] = torch.ones(x.shape, dtype=x.dtype)
        copied = bare_copy(module, memo).eval()
        width = own[0].numel() if own[0].numel() > 1 else _WIDTH
        return any(_is_invariant(copied, x) or _is_invariant(copied, x, torch.ones_like(x)) for x in _inputs(width))


def _inputs(width: int) -> Iterator[Tensor]:
    """Yield inputs with the features last, then second, for images, series and volumes."""
    for shape in ((4, 3, width), (4, width), (4, width, 3), (4, width, 3, 3), (4, width, 3, 3, 3)):
        yield _LARGE * torch.randn(shape)


def _is_invariant(module: Any, x: Tensor, *gate: Tensor) -> bool:
    try:
        y, scaled, other = (module(z, *gate) for z in (x, 4 * x, x.flip(0)))
        return torch.allclose(y, scaled, 1e-2, 1e-2) and not torch.allclose(y, other, 1e-2, 1e-2)
    except Exception:  # whatever it raises for an input of another shape, or without a gate
        return False
