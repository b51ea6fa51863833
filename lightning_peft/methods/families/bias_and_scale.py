"""``BiasAndScale``: shifts and scales the output of a linear layer by learned vectors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Call, parameter_like
from ...structure.layer_of import layer_of
from .fused_scaling import scaled_output


class BiasAndScale(Adapter):
    """scale o (host(x) + bias), with ``scale`` (out,) from one and ``bias`` (out,) from zero."""

    part = "affine"  # a method can have another adapter on the same host

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.layer = layer_of(host)
        weight, width = self.layer.parameter(host), self.layer.shape(host)[0]
        self.scale, self.bias = parameter_like(weight, width), parameter_like(weight, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        if self.layer.weight_read_by_parent:
            return inner(*args, **kwargs)  # the host reads weight and bias from properties that return the changed ones
        return self._called(host, inner, *args, **kwargs)

    def _called(self, host: Any, inner: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = functools.partial(inner, *args, **kwargs) if args or kwargs else inner
        return scaled_output(self.layer, host, call, x, self.scale, self.bias)

    def effective_weight(self, weight: Tensor) -> Tensor:
        return (weight * self.scale[:, None]).to(weight.dtype)

    def effective_bias(self, bias: Tensor | None) -> Tensor:
        return self.scale * self.bias if bias is None else (self.scale * (bias + self.bias)).to(bias.dtype)

    @torch.no_grad()
    def merge(self, host: Any) -> None:
        """Change weight and bias of the host; a host without a bias gets one.

        Raises:
            TypeError: The host's class has no bias.
        """
        self.layer.write_bias(host, self.effective_bias(self.layer.bias(host)))  # first, since it may refuse
        weight = self.layer.read(host)
        scale = self.scale.view(-1, *[1] * (weight.dim() - 1))
        self.layer.write(host, weight.to(torch.promote_types(weight.dtype, torch.float32)) * scale)
