"""``scaled_output`` and ``scaled_input`` of a linear layer: few operators for few tokens, few saved bytes for many.

Up to ``FEW`` numbers, scales are a plain product. Above, autograd saves the scaled output, which the next layer mostly
saves as well, and where tokens are many, scales are multiplied into the weight, which backward rebuilds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.adapter import Call, InnerCall
from ...ops.autograd_function import apply_function, records_gradients
from ...ops.factor_type import in_type
from ...ops.fused_linear import autocast_disabled
from ...ops.parametrizations import sum_over_tokens
from ...ops.torch_api import element_count
from ...structure.layer_types import LayerType

# Numbers of an input or output up to which a plain product is used. By the time of forward and backward of layers 64 to
# 1,024 wide (one thread of an x86 CPU, torch 2.13, float32) it is the fastest up to 2**19 of them. Above 2**17, the
# bytes that it saves for backward count more.
FEW = 2**17


def scaled_output(
    layer: LayerType, host: Any, call: Call, x: Tensor, scales: Tensor, shift: Tensor | None = None
) -> Tensor:
    """Return scales o (call(x) + shift), where ``call`` is the ``inner`` of an adapter of ``host``."""
    if element_count(x) > FEW and _scales_weight(layer, host, call, x):
        bias = host.bias if shift is None else shift if host.bias is None else host.bias + shift
        return _apply(_ScaledLinear, x, layer.read(host), bias, scales)
    y: Tensor = call(x)
    scales = _beside_features(layer, host, scales)
    if shift is not None:
        y = y + in_type(_beside_features(layer, host, shift), y.dtype)
    if element_count(y) > FEW and y.dtype != torch.float16 and records_gradients():  # dividing needs more than float16
        return _apply(_Scaled, y, scales)
    return _product(y, scales)


def scaled_input(layer: LayerType, host: Any, call: Call, x: Tensor, scales: Tensor) -> Tensor:
    """Return call(scales o x), where ``call`` is the ``inner`` of an adapter of ``host``."""
    if element_count(x) > FEW and _scales_weight(layer, host, call, x):
        return _apply(_LinearOfScaled, x, layer.read(host), host.bias, scales)
    result: Tensor = call(_product(x, _beside_features(layer, host, scales)))
    return result


def _beside_features(layer: LayerType, host: Any, values: Tensor) -> Tensor:
    """Return a value for each feature in a shape that meets an input or output of the layer."""
    if layer.maps_features:
        return values
    return values.view(-1, *[1] * (len(layer.shape(host)) - 2))  # the dimensions of a kernel are behind the features


def _product(x: Tensor, scales: Tensor) -> Tensor:
    """Return scales o x in the type of x; scales, which may be wider, are not rounded."""
    return in_type(x * scales, x.dtype)


def _scales_weight(layer: LayerType, host: Any, call: Call, x: Tensor) -> bool:
    """Return whether scales can be multiplied into the host's frozen weight, and are cheaper there than on tokens."""
    if not isinstance(call, InnerCall) or call.adapters or not layer.is_plain_matmul(host, call.forward):
        return False
    training, wide = records_gradients(), host.weight.dtype in (torch.float32, torch.float64)
    with autocast_disabled(x) as dtype:
        exact = wide and not (training and (host.weight.requires_grad or dtype == torch.float16))
    return exact and element_count(x) >= host.weight.numel()


def _apply(function: type[torch.autograd.Function], x: Tensor, *args: Any) -> Tensor:
    with autocast_disabled(x) as dtype:
        return apply_function(function, x, *args, dtype or x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _not_zero(scales: Tensor) -> Tensor:
    """Return scales; those closer to zero than 1e-20 are that, since backward divides the saved output by them."""
    least = 1e-20  # a global would be an input to torch.compile(dynamic=True), which fails in the second function
    return torch.where(scales.abs() < least, least, scales)


def _sums(g: Tensor, y: Tensor) -> Tensor:
    """Return the sums over tokens of g y."""
    return sum_over_tokens(g.flatten(0, -2), y.flatten(0, -2).to(g.dtype), None)


class _Scaled(torch.autograd.Function):
    """scales o y; saves the output alone."""

    @staticmethod
    def forward(y: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return (y * _not_zero(scales)).to(y.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        scales, y = ctx.saved_tensors
        wide = torch.promote_types(g.dtype, torch.float32)
        sums = _sums(g, y) if scales.dim() == 1 else (g * y).to(wide).sum_to_size(scales.shape)
        factor = _not_zero(scales)
        return (g * factor).to(g.dtype), (sums / factor).to(scales.dtype), None


class _ScaledLinear(torch.autograd.Function):
    """scales o (x W^T + bias), by a scaled weight; saves the output, and not x."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor, dtype: torch.dtype) -> Tensor:
        scales = _not_zero(scales)
        return _linear(x, weight * scales[:, None], None if bias is None else bias * scales, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, scales, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(weight, scales, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        weight, scales, y = ctx.saved_tensors
        with autocast_disabled(g):
            factor = _not_zero(scales)
            by_x = (g @ (weight * factor[:, None]).to(g.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
            by_bias = g.flatten(0, -2).sum(0) * factor if ctx.needs_input_grad[2] else None
            by_scales = (_sums(g, y) / factor).to(scales.dtype)
        return by_x, None, by_bias, by_scales, None


class _LinearOfScaled(torch.autograd.Function):
    """(scales o x) W^T + bias, by a scaled weight; saves x."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return _linear(x, weight * scales, bias, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, scales, _ = inputs
        ctx.save_for_backward(x, weight, scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        x, weight, scales = ctx.saved_tensors
        with autocast_disabled(g):
            by_scaled = g @ weight.to(g.dtype)
            by_x = (by_scaled * scales).to(x.dtype) if ctx.needs_input_grad[0] else None
            by_bias = g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
            by_scales = _sums(by_scaled, x).to(scales.dtype)
        return by_x, None, by_bias, by_scales, None
