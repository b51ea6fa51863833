"""``shape_of_a``, ``start_factors``, ``times_kronecker`` and ``add_kronecker``: shapes, start, products of A kron B."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...core.method import check_setting
from ...ops.factor_type import factor_type, one_type


def check_kronecker(shape_a: Sequence[int] | None, factor: int | None, scale: float) -> None:
    """Raise a ``ValueError`` if settings are wrong for every layer."""
    valid = shape_a is None or (len(shape_a) == 2 and all(type(side) is int and side > 0 for side in shape_a))
    check_setting(valid, "shape_a", shape_a, "two positive whole numbers or None")
    check_setting(
        factor is None or (type(factor) is int and factor > 0), "factor", factor, "a positive whole number or None"
    )
    check_setting(shape_a is None or factor is None, "factor", factor, "None where shape_a is given")
    check_setting(math.isfinite(scale) and scale > 0, "scale", scale, "a positive number")


def shape_of_a(
    name: str, inputs: int, outputs: int, shape_a: Sequence[int] | None, factor: int | None, kernel: int = 1
) -> tuple[int, int]:
    """Return (a1, a2): ``shape_a``, or the largest divisors up to ``factor``, or the shape with the fewest parameters.

    Args:
        name: Name of the layer, for the message.
        inputs: Number of inputs, which a1 divides.
        outputs: Number of outputs, which a2 divides.
        shape_a: Setting of the method.
        factor: Largest side.
        kernel: Number of positions of a convolution's kernel, which B has and A has not.

    Raises:
        ValueError: ``shape_a`` does not divide the inputs and outputs.
    """
    if shape_a is not None:
        a1, a2 = shape_a
        fits = f"[a1, a2] with a1 dividing {inputs} (in; near: {_near(inputs, a1)})"
        fits = f"{fits} and a2 dividing {outputs} (out; near: {_near(outputs, a2)})"
        check_setting(inputs % a1 == 0 and outputs % a2 == 0, f"shape_a at {name}", list(shape_a), fits)
        return a1, a2
    if factor is not None:
        a1, a2 = (max(d for d in _divisors(side) if d <= factor) for side in (inputs, outputs))
        return a1, a2
    return _smallest(inputs, outputs, kernel)


def start_factors(a: Tensor, b: Tensor) -> None:
    """Fill A and B so that A kron B = 0: A is Kaiming uniform over its a1 inputs, B zero, as LyCORIS does.

    peft's LoKr sets the other factor to zero.
    """
    nn.init.kaiming_uniform_(a.detach().T, a=math.sqrt(5))  # transposed, since torch takes rows as outputs
    nn.init.zeros_(b)


def times_kronecker(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return x (A kron B) for x (..., a1 b1), as A^T X B with X (a1, b1): two small products, the cheaper one first."""
    dtype = factor_type(x)
    flat, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
    if _a_first(a, b):
        y = _times_transposed(a, flat, len(b)) @ b
    else:
        y = _times_transposed(a, flat.reshape(-1, len(b)) @ b, b.shape[1])
    return y.reshape(*x.shape[:-1], a.shape[1] * b.shape[1])


def add_kronecker(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return y + scale x (A kron B) for x (..., a1 b1) and y (..., a2 b2), in the type of y.

    Where all types are one, the sum is part of the second product. Autograd saves x and what is between the products.
    """
    if not (one_type(x, y, a, b) and _a_first(a, b)):
        return torch.add(y, times_kronecker(x, a, b), alpha=scale).to(y.dtype)
    hidden = _times_transposed(a, x, len(b))
    return torch.addmm(y.reshape(-1, b.shape[1]), hidden, b, alpha=scale).view(y.shape)


def _times_transposed(a: Tensor, x: Tensor, columns: int) -> Tensor:
    """Return A^T X for each X (a1, columns) in x, one below the other; ``a.T @ x`` would copy x to make them one."""
    tokens, (a1, a2) = x.numel() // (len(a) * columns), a.shape
    if tokens == 1:
        return torch.mm(a.t(), x.reshape(a1, columns))
    return torch.bmm(a.t().expand(tokens, a2, a1), x.reshape(tokens, a1, columns)).view(-1, columns)


def _a_first(a: Tensor, b: Tensor) -> bool:
    """Return whether A^T X before the product with B has no more multiplications than X B before that with A^T."""
    (a1, a2), (b1, b2) = a.shape, b.shape
    return a2 * b1 * (a1 + b2) <= a1 * b2 * (b1 + a2)


@functools.cache
def _smallest(inputs: int, outputs: int, kernel: int) -> tuple[int, int]:
    """Return (a1, a2) with the fewest numbers in A and B; among equals the highest rank, then the tallest A."""

    def merit(shape: tuple[int, int]) -> tuple[int, int, int]:
        (a1, a2), (b1, b2) = shape, (inputs // shape[0], outputs // shape[1])
        return a1 * a2 + b1 * b2 * kernel, -min(a1, a2) * min(b1 * kernel, b2), -a1

    return min(((a1, a2) for a1 in _divisors(inputs) for a2 in _divisors(outputs)), key=merit)


@functools.cache
def _divisors(number: int) -> list[int]:
    """Return all divisors of a number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _near(number: int, value: int) -> str:
    """Return the two divisors of a number up to a value, and the two above it, as text."""
    divisors = _divisors(number)
    below = [d for d in divisors if d <= value][-2:]
    return ", ".join(map(str, [*below, *[d for d in divisors if d > value][:2]]))
