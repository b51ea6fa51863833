"""One product with an updated weight instead of a product and an update; saves the input, rebuilds the weight.

A form says how factors update a weight ``w`` of shape (out, in), and what their gradients are, given the gradient ``g``
of shape (tokens, out) and the input ``x`` of shape (tokens, in). No gradient of a full weight is formed where the
factors' own are cheaper.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Form(ABC):
    """How factors update a weight."""

    keeps_output = False  # whether gradients are computed from the output as well
    dense = False  # whether the update by itself costs as much as the layer, so that one product is always cheaper

    @abstractmethod
    def updated(self, w: Tensor, *factors: Tensor) -> Tensor:
        """Return the updated weight."""

    @abstractmethod
    def gradients(self, g: Tensor, x: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        """Return the gradients of the factors."""


@dataclass(frozen=True)
class LowRank(Form):
    """W + scale B A, with A (rank, in) and B (out, rank)."""

    scale: float

    def updated(self, w: Tensor, *factors: Tensor) -> Tensor:
        a, b = factors
        return torch.addmm(w, b, a, alpha=self.scale)

    def gradients(self, g: Tensor, x: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        a, b = (factor.to(g.dtype) for factor in factors)
        return ((g @ b).T @ x) * self.scale, ((x @ a.T).T @ g).T * self.scale


@dataclass(frozen=True)
class Decomposed(LowRank):
    """m (W + scale B A) / ||W + scale B A||, row by row; the norm takes part in no gradient, as in the paper."""

    keeps_output = True
    dense = True

    def updated(self, w: Tensor, *factors: Tensor) -> Tensor:
        a, b, magnitude = factors
        v = super().updated(w, a, b)
        return v.mul_(row_factor(v, magnitude)[:, None])

    def gradients(self, g: Tensor, x: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        """Return the gradients; here the weight, the output and its bias follow the factors."""
        a, b, magnitude, w, y, bias = factors
        c = row_factor(super().updated(w, a, b), magnitude)[:, None]
        by_a, by_b = super().gradients(g, x, a, c * b)
        by_rows = column_sums(g, y, bias).to(a.dtype)
        by_magnitude = (by_rows / magnitude).masked_fill(magnitude == 0, 0)  # rows of zeros start there, and stay
        return by_a, by_b * c, by_magnitude


def column_sums(g: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sums over tokens of g (y - bias)."""
    # On the CPU in pieces that stay in its cache: a product of full size is written to fresh memory and read again.
    whole = g.device.type != "cpu" or torch.compiler.is_compiling()
    size = max(1, len(g)) if whole else 256
    ones = g.new_ones(1, size)  # as a factor, it sums columns faster than sum(0)
    total = torch.zeros(g.shape[1], dtype=torch.promote_types(g.dtype, torch.float32), device=g.device)
    for start in range(0, len(g), size):
        part, row = g[start : start + size], ones[:, : len(g) - start]
        total = total + (row @ (part * y[start : start + size])).squeeze(0)
        if bias is not None:
            total = total - (row @ part).squeeze(0) * bias
    return total


def row_factor(v: Tensor, magnitude: Tensor) -> Tensor:
    """Return m / ||v|| of each row of ``v``, through whose norm no gradient flows."""
    norm = torch.linalg.vector_norm(v.detach().flatten(1), dim=1)
    factor: Tensor = magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return factor


@dataclass(frozen=True)
class Hadamard(Form):
    """W + f(X1 Y1^T) o (f(X2 Y2^T) + shift), with Xi (out, rank), Yi (in, rank), f the identity or tanh."""

    dense = True
    tanh: bool
    shift: float

    def updated(self, w: Tensor, *factors: Tensor) -> Tensor:
        return torch.addcmul(w, *self.pair(*factors))

    def pair(self, x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Return both matrices of the elementwise product."""
        return self.bend(x1 @ y1.T, x2 @ y2.T)

    def bend(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        """Return f of both matrices, the second shifted."""
        if self.tanh:
            one, two = one.tanh(), two.tanh()
        return one, two + self.shift if self.shift else two

    def gradients(self, g: Tensor, x: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        x1, y1, x2, y2 = factors
        one, two = self.pair(*factors)
        by_weight = (g.T @ x).to(one.dtype)
        by_one, by_two = by_weight * two, by_weight * one
        if self.tanh:
            by_one, by_two = by_one * (1 - one.square()), by_two * (1 - (two - self.shift).square())
        return by_one @ y1, by_one.T @ x1, by_two @ y2, by_two.T @ x2


@dataclass(frozen=True)
class Kronecker(Form):
    """W + scale (A kron B)^T, with A (a1, a2) and B (b1, b2), a1 b1 = in and a2 b2 = out."""

    scale: float

    def updated(self, w: Tensor, *factors: Tensor) -> Tensor:
        (a1, a2), (b1, b2) = (factor.shape for factor in factors)
        a, b = factors
        grid = w.reshape(a2, b2, a1, b1)
        return torch.addcmul(grid, a.T[:, None, :, None], b.T[:, None, :], value=self.scale).reshape(w.shape)

    def gradients(self, g: Tensor, x: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        a, b = (factor.to(g.dtype) for factor in factors)
        (a1, a2), (b1, b2), tokens = a.shape, b.shape, len(x)
        xs = x.view(tokens, a1, b1).transpose(0, 1).reshape(a1, tokens * b1)
        gs = g.reshape(tokens, a2, b2).transpose(0, 1).reshape(a2 * tokens, b2)
        by_a = xs @ (gs @ b.T).view(a2, tokens * b1).T
        by_b = (a.T @ xs).view(a2 * tokens, b1).T @ gs
        return by_a * self.scale, by_b * self.scale


Rows = tuple[int, int]  # the first row of a weight that a form updates, and the one after the last


@dataclass(frozen=True)
class Update:
    """A form, the rows of the weight that it updates, and its factors."""

    form: Form
    rows: Rows
    factors: tuple[Tensor, ...]


def saves_work(updates: Sequence[Update], x: Tensor, weight: Tensor) -> bool:
    """Whether one product with the updated weight beats adding the updates: with many tokens for the weight's size.

    Rebuilding a weight moves out x in numbers, adding updates moves tokens x (out + in).
    """
    out, features = weight.shape
    tokens = x.numel() // features
    return tokens * (out + features) >= out * features or any(update.form.dense for update in updates)


def updated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """Return x W'^T + bias, where W' is the (out, in) weight with its rows updated.

    The same values and gradients as ``F.linear(x, form.updated(weight, *factors), bias)``, of which only ``x`` and,
    where a form asks for it, the output are saved. Works in autocast's type where autocast is on; the weight is
    updated in its own type and rounded once.
    """
    forms = tuple((update.form, update.rows, len(update.factors)) for update in updates)
    factors = [factor for update in updates for factor in update.factors]
    with _own_types(x) as dtype:
        return _apply(_UpdatedLinear, x, weight, bias, dtype, forms, *factors)


def updated_weight(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """Return the (out, in) weight with its rows updated."""
    forms = tuple((update.form, update.rows, len(update.factors)) for update in updates)
    return _updated(weight, forms, [factor for update in updates for factor in update.factors])


def dropped_low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    """Return scale dropout(x) A^T B^T, saving ``x`` and one bit per input; ``p`` counts in steps of 1 / 65536."""
    step = round(p * 65536)
    words = torch.empty(-(-x.numel() // 8) * 2, dtype=torch.int64, device=x.device)
    draws = words.random_(torch.iinfo(torch.int64).min, None).view(torch.int16)  # a fourth of the time of floats
    flags = draws >= step - 32768
    kept, bits = flags[: x.numel()].view(x.shape), _pack(flags)
    with _own_types(x) as dtype:
        return _apply(_DroppedLowRank, x, kept, bits, a, b, scale / (1 - step / 65536), dtype or x.dtype)


def _pack(flags: Tensor) -> Tensor:
    """Return booleans, a multiple of eight, as bits."""
    gathered = (flags.view(torch.int64) * 0x0102040810204080) >> 56  # the highest byte collects the lowest bit of each
    return gathered.to(torch.uint8)


def _unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the first of packed bits as zeros and ones, in bytes."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).flatten()[: shape.numel()].view(shape)


@contextlib.contextmanager
def _own_types(x: Tensor) -> Any:
    """Context without autocast; gives the type that autocast would have worked in."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        yield None
        return
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        yield dtype


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


Forms = tuple[tuple[Form, Rows, int], ...]


def _by_form(forms: Forms, factors: Sequence[Tensor]) -> list[tuple[Form, slice, Sequence[Tensor]]]:
    rest = iter(factors)
    return [(form, slice(*rows), list(itertools.islice(rest, count))) for form, rows, count in forms]


def _updated(weight: Tensor, forms: Forms, factors: Sequence[Tensor]) -> Tensor:
    parts = _by_form(forms, factors)
    if len(parts) == 1 and parts[0][1] == slice(0, len(weight)):
        return parts[0][0].updated(weight, *factors)
    new = weight.clone()
    for form, rows, own in parts:
        new[rows] = form.updated(new[rows], *own)
    return new


class _UpdatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None, forms: Forms, *factors: Tensor
    ) -> Tensor:
        new = _updated(weight, forms, factors)
        if dtype is not None:
            x, new, bias = x.to(dtype), new.to(dtype), None if bias is None else bias.to(dtype)
        return F.linear(x, new, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, _, forms, *factors = inputs
        ctx.forms = forms
        keeps = any(form.keeps_output for form, *_ in forms)
        ctx.save_for_backward(x, weight, *((bias, output) if keeps else (None, None)), *factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        x, weight, bias, y, *factors = ctx.saved_tensors
        with _own_types(g):
            by_x = None
            if ctx.needs_input_grad[0]:
                by_x = (g @ _updated(weight, ctx.forms, factors).to(g.dtype)).to(x.dtype)
            g, x = g.flatten(0, -2), x.flatten(0, -2).to(g.dtype)
            by_bias = g.sum(0) if ctx.needs_input_grad[2] else None
            found: list[Tensor] = []
            for form, rows, own in _by_form(ctx.forms, factors):
                more: tuple[Any, ...] = ()
                if form.keeps_output:
                    more = (weight[rows], y.flatten(0, -2)[:, rows], None if bias is None else bias[rows])
                found += form.gradients(g[:, rows], x, *own, *more)
            found = [gradient.to(factor.dtype) for gradient, factor in zip(found, factors, strict=True)]
        return by_x, None, by_bias, None, None, *found


class _DroppedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, kept: Tensor, bits: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        return F.linear(F.linear((x * kept).to(dtype), a.to(dtype)) * scale, b.to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, bits, a, b, ctx.scale, _ = inputs
        ctx.save_for_backward(x, bits, a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        x, bits, a, b = ctx.saved_tensors
        kept = _unpack(bits, x.shape)
        with _own_types(g):
            narrow_a, by_inner = a.to(g.dtype), (g @ b.to(g.dtype)) * ctx.scale
            by_x = ((by_inner @ narrow_a) * kept).to(x.dtype) if ctx.needs_input_grad[0] else None
            dropped = (x * kept).to(g.dtype).flatten(0, -2)
            by_a = by_inner.flatten(0, -2).T @ dropped
            by_b = g.flatten(0, -2).T @ (dropped @ narrow_a.T) * ctx.scale
        return by_x, None, None, by_a.to(a.dtype), by_b.to(b.dtype), None, None
