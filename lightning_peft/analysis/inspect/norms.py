"""Norms of tensors, and of updates B A in the space of their rank: the whole matrix is never built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def norm(tensor: Tensor) -> float:
    """Return the Frobenius norm."""
    return float(torch.linalg.vector_norm(tensor.double()))


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of B A, descending: those of R_B R_A^T, where B = Q_B R_B and A^T = Q_A R_A."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return torch.tensor([math.nan])
    r_b, r_a = (torch.linalg.qr(factor.double(), mode="r").R for factor in (b, a.T))
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
    return values


def tensor_distances(one: Tensor, other: Tensor) -> dict[str, float | None]:
    """Return norms, difference and cosine of two tensors of one shape."""
    one, other = one.double(), other.double()
    return distances(norm(one), norm(other), norm(one - other), float((one * other).sum()))


def update_distances(one: Pair, other: Pair) -> dict[str, float | None]:
    """Return the same for two updates B A, whatever their factors are."""
    (a1, b1), (a2, b2) = ((a.double(), b.double()) for a, b in (one, other))
    difference = singular_values(torch.cat([a1, a2]), torch.cat([b1, -b2], 1))
    inner = ((b1.T @ b2) * (a1 @ a2.T)).sum()
    one_norm, other_norm = norm(singular_values(a1, b1)), norm(singular_values(a2, b2))
    return distances(one_norm, other_norm, norm(difference), float(inner))


def distances(one: float, other: float, apart: float, inner: float) -> dict[str, float | None]:
    """Return norms, the norm of the difference, the same relative to the first, and the cosine; None for no number."""
    relative, cosine = (part / of if of else math.nan for part, of in ((apart, one), (inner, one * other)))
    figures = {"one": one, "other": other, "difference": apart, "relative": relative, "cosine": cosine}
    return {key: finite_or_none(value) for key, value in figures.items()}


def total_distances(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the distances of all tensors as if they were one."""

    def total(key: str) -> float:
        return math.sqrt(sum((math.nan if row[key] is None else row[key]) ** 2 for row in rows))

    inner = sum((row["cosine"] or 0.0) * (row["one"] or 0.0) * (row["other"] or 0.0) for row in rows)
    return distances(total("one"), total("other"), total("difference"), inner)


def finite_or_none(value: float) -> float | None:
    """Return the number, or None if JSON cannot write it (nan, infinity)."""
    return value if math.isfinite(value) else None


def json_ready(data: Any) -> Any:
    """Return plain data with None in place of nan and infinity."""
    if isinstance(data, dict):
        return {key: json_ready(value) for key, value in data.items()}
    if isinstance(data, list):
        return [json_ready(value) for value in data]
    return finite_or_none(data) if isinstance(data, float) else data


def value_range(values: Iterable[float | None]) -> list[float]:
    """Return the least and the largest number."""
    numbers = [value for value in values if value is not None]
    return [min(numbers), max(numbers)] if numbers else []
