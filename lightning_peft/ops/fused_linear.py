"""``updated_linear``: y = x W'^T as one product; backward rebuilds the updated weight W' from W and its factors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd_function import apply_function
from .factor_type import under_autocast
from .parametrizations import Parametrization
from .torch_api import element_count

# Numbers of a weight, 64 KB, up to which torch's own operators update it, and keep it for backward; above, a function
# that saves no weight is as fast (time of forward and backward on one thread of an x86 CPU, torch 2.13, float32).
TINY_WEIGHT = 2**14
Rows = tuple[int, int]  # the first row of a weight that an update changes, and the row after the last one


@dataclass(frozen=True)
class WeightUpdateSpec:
    """Update of some rows of a weight: a parametrization and its factors."""

    form: Parametrization
    rows: Rows
    factors: tuple[Tensor, ...]


def rebuilding_is_cheaper(updates: Sequence[WeightUpdateSpec], x: Tensor, weight: Tensor) -> bool:
    """Return whether one product with the updated weight is cheaper than adding the updates to the output.

    Rebuilding a weight moves out x in numbers, adding updates moves tokens x (out + in).
    """
    out, features = weight.shape
    tokens = element_count(x) // features
    return tokens * (out + features) >= out * features or any(update.form.rebuilds_full_weight for update in updates)


def updated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[WeightUpdateSpec]) -> Tensor:
    """Return x W'^T + bias, where W' is the (out, in) weight with its rows updated.

    Values and gradients are those of ``F.linear(x, form.updated(weight, *factors), bias)``, but autograd saves only
    ``x`` and, for parametrizations with ``saves_output``, the output. Under autocast, the product runs in autocast's
    type; the weight is updated in its own type and rounded once.
    """
    forms, factors = _flatten(updates)
    with autocast_disabled(x) as dtype:
        return apply_function(_UpdatedLinear, x, weight, bias, dtype, forms, *factors)


def updated_weight(weight: Tensor, updates: Sequence[WeightUpdateSpec]) -> Tensor:
    """Return the (out, in) weight with its rows updated."""
    return _updated(weight, *_flatten(updates))


def autocast_disabled(x: Tensor) -> AbstractContextManager[torch.dtype | None]:
    """Return a context without autocast; it yields autocast's type, or None where autocast was off."""
    return _without_autocast(x.device.type) if under_autocast(x) else nullcontext()


@contextmanager
def _without_autocast(device_type: str) -> Iterator[torch.dtype]:
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        yield dtype


Forms = tuple[tuple[Parametrization, Rows, int], ...]


def _flatten(updates: Sequence[WeightUpdateSpec]) -> tuple[Forms, list[Tensor]]:
    """Return (forms, factors): autograd functions take tensors as single arguments. ``_unflatten`` is the inverse."""
    forms: Forms = ()
    factors: list[Tensor] = []
    for update in updates:
        forms += ((update.form, update.rows, len(update.factors)),)
        factors += update.factors
    return forms, factors


def _unflatten(forms: Forms, factors: Sequence[Tensor]) -> list[tuple[Parametrization, slice, Sequence[Tensor]]]:
    """Return (parametrization, rows, factors) of each update."""
    rest = iter(factors)
    return [(form, slice(*rows), list(itertools.islice(rest, count))) for form, rows, count in forms]


def _updated(weight: Tensor, forms: Forms, factors: Sequence[Tensor]) -> Tensor:
    if len(forms) == 1 and forms[0][1] == (0, len(weight)):
        return forms[0][0].updated(weight, *factors)
    new = weight.clone()
    for form, rows, form_factors in _unflatten(forms, factors):
        new[rows] = form.updated(new[rows], *form_factors)
    return new


class _UpdatedLinear(torch.autograd.Function):
    """x W'^T + bias; saves x, W and the factors, and rebuilds W' in backward."""

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
        saves_output = any(form.saves_output for form, *_ in forms)
        ctx.save_for_backward(x, weight, *((bias, output) if saves_output else (None, None)), *factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        x, weight, bias, y, *factors = ctx.saved_tensors
        with autocast_disabled(g):
            by_x = None
            if ctx.needs_input_grad[0]:
                by_x = (g @ _updated(weight, ctx.forms, factors).to(g.dtype)).to(x.dtype)
            g, x = g.flatten(0, -2), x.flatten(0, -2).to(g.dtype)
            by_bias = g.sum(0) if ctx.needs_input_grad[2] else None
            by_factors: list[Tensor] = []
            for form, rows, form_factors in _unflatten(ctx.forms, factors):
                saved: tuple[Any, ...] = ()
                if form.saves_output:
                    saved = (weight[rows], y.flatten(0, -2)[:, rows], None if bias is None else bias[rows])
                by_factors += form.gradients(g[:, rows], x, *form_factors, *saved)
            by_factors = [by.to(factor.dtype) for by, factor in zip(by_factors, factors, strict=True)]
        return by_x, None, by_bias, None, None, *by_factors
