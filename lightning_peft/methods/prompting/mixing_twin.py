"""``mixing_twin``: a copy of a model in which each output depends on the input, that runs in a second on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...structure.quantized import is_quantized
from ...structure.tracing.hollow_twin import hollow_twin


def mixing_twin(host: nn.Module) -> nn.Module:
    """Return a hollow twin in which the output of each layer depends on its input, and nothing is random."""
    twin = hollow_twin(host)
    quantized = {name for name, part in host.named_modules() if is_quantized(part)}  # the twin has no codes to read
    for name, part in twin.named_modules():
        stand_in, width = vars(part).get("forward"), vars(part).get("out_features")
        if stand_in is not None or name in quantized:
            part.forward = partial(_mixed, stand_in or part.forward, width)
    return twin


def _mixed(stand_in: Callable[..., Tensor], width: int | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return numbers of the shape that a layer's output has: those of ids, or sums of features of x.

    The stand-in returns numbers of this shape that do not depend on x; with a width, that of the output, it is not
    called.
    """
    shape = (*x.shape[:-1], width) if width else stand_in(x, *args, **kwargs).shape
    feature = torch.arange(shape[-1])
    if not x.is_floating_point():
        return torch.sin((x[..., None] + 1) * (feature + 1) * 0.37)
    if shape[:-1] != x.shape[:-1]:  # a convolution
        return torch.sin(feature + x.flatten(1).mean(1).view(-1, *[1] * (len(shape) - 1))).expand(shape)
    tiles = torch.cat([x] * -(-shape[-1] // x.shape[-1]), -1)[..., : shape[-1]]
    return (tiles + x.mean(-1, keepdim=True)) * torch.cos(feature)
