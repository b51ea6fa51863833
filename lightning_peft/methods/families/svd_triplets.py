"""Triplets of a singular-value-like decomposition: what they are, how they are scored, which of them are kept."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from ...core.adapter import has_values, parameter_like
from ...structure.fused_rows import Rows
from .low_rank import LowRankUpdate

_FACTORS = ("a", "b", "e")


class SVDTriplets(LowRankUpdate):
    """scale P diag(E) Q, with Q (rank, in, *kernel) as ``a``, P (out, rank) as ``b`` and E (rank,) as ``e``.

    Buffers hold the moving averages of each entry's sensitivity and of its deviation, and which triplets are kept.

    Args:
        host: Layer to update.
        rank: Number of triplets.
        scale: Factor of the update.
        dropout: Probability with which inputs are dropped in training; not where inputs are indices.
        rows: Rows of a fused layer to update.
    """

    plot_tensors = {"ranks": "kept"}

    def __init__(self, host: Any, rank: int, scale: float, dropout: float = 0.0, rows: Rows | None = None) -> None:
        super().__init__(host, scale, dropout, rows)
        out, *rest = self.shape
        for name, shape in zip(_FACTORS, ((rank, *rest), (out, rank), (rank,)), strict=True):
            factor = parameter_like(self.layer.parameter(host), *shape)
            self.register_parameter(name, factor)
        self.kept = nn.Buffer(torch.empty_like(self.e))
        entries = sum(factor.numel() for factor in self.factor_tensors())
        self.mean, self.spread = (nn.Buffer(self.kept.new_empty(entries)) for _ in range(2))
        self.reset_parameters()

    a: nn.Parameter
    b: nn.Parameter
    e: nn.Parameter

    def reset_parameters(self) -> None:
        """Start at no update: P and Q normal with deviation 0.02 as in the authors' code, E zero."""
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)
        for tensor in (self.e, self.mean, self.spread):
            nn.init.zeros_(tensor)
        nn.init.ones_(self.kept)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.a * self.e.view(-1, *[1] * (self.a.dim() - 1)), self.b

    def factor_tensors(self) -> Sequence[Tensor]:
        return self.a, self.b, self.e

    def export_state(self) -> dict[str, Tensor]:
        """Return the triplets that are kept, alone."""
        if not has_values(self.kept):  # nobody knows which
            return {name: self.get_parameter(name) for name in _FACTORS}
        live = (self.kept != 0) | (self.e.detach() != 0)
        return {"a": self.a.detach()[live], "b": self.b.detach()[:, live], "e": self.e.detach()[live]}

    def import_state(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a whole state without averages: triplets that were left out have no influence, but can grow."""
        device = "cpu" if self.kept.is_meta else None  # then in files alone
        state = {name: torch.zeros_like(value, device=device) for name, value in self.state_dict().items()}
        factors = {n: state[n] if device else self.get_parameter(n).detach().clone() for n in ("a", "b")}
        factors["e"] = state.pop("e")
        count = packed["e"].numel() if "e" in packed else -1
        fits = {"a": (count, *self.a.shape[1:]), "b": (len(self.b), count), "e": (count,)}
        if count > len(self.e) or {name: tuple(value.shape) for name, value in packed.items()} != fits:
            return {name: value for name, value in state.items() if name not in _FACTORS} | dict(packed)  # refused
        for name, value in packed.items():
            factors[name][(slice(None), slice(count)) if name == "b" else slice(count)] = value
        state["kept"][:count] = 1
        return state | factors

    def split_factors(self, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return entries of shape (..., all) as (..., rank, -1) of Q, (..., out, rank) of P and (..., rank) of E."""
        rank = len(self.e)
        a, b, e = torch.split(entries, [factor.numel() for factor in self.factor_tensors()], -1)
        return a.unflatten(-1, (rank, -1)), b.unflatten(-1, (-1, rank)), e  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        rank = int(self.kept.sum()) if has_values(self.kept) else len(self.e)
        return f"rank={rank} of {len(self.e)}, scale={self.scale:g}"


def observe(found: Sequence[SVDTriplets], beta1: float, beta2: float) -> None:
    """Take the sensitivities |w dL/dw| of one step into the averages; a step without finite gradients is no step.

    All entries lie in one row: a few large operations instead of several for each tensor.
    """
    ordered = [one for group in group_by_shape(found) for one in group]
    factors = [factor for one in ordered for factor in one.factor_tensors()]
    gradients = [torch.zeros_like(f) if f.grad is None else f.grad for f in factors]
    sensitivities: Tensor = _flatten_dense_tensors(gradients)  # type: ignore[no-untyped-call]
    if not sensitivities.sum().isfinite():
        return  # a gradient scaler has skipped this step
    sensitivities.mul_(_flatten_dense_tensors(factors)).abs_()  # type: ignore[no-untyped-call]
    means, spreads = as_contiguous_view(ordered, "mean"), as_contiguous_view(ordered, "spread")
    means.lerp_(sensitivities, 1 - beta1)
    spreads.lerp_(sensitivities.sub_(means).abs_(), 1 - beta2)


def allocate(found: Sequence[SVDTriplets], budget: int) -> None:
    """Keep the ``budget`` best triplets of all, and set E of the others to zero."""
    groups = group_by_shape(found)
    ordered = [one for group in groups for one in group]
    scores = score(groups)
    kept = torch.zeros_like(scores)
    kept[scores.topk(budget).indices] = 1
    parts = list(torch.split(kept, [one.e.numel() for one in ordered]))
    torch._foreach_copy_([one.kept for one in ordered], parts)
    torch._foreach_mul_([one.e for one in ordered], parts)


def group_by_shape(found: Sequence[SVDTriplets]) -> list[list[SVDTriplets]]:
    """Return the triplets of all layers in groups of equal shapes."""
    groups = defaultdict[tuple[Any, ...], list[SVDTriplets]](list)
    for one in found:
        groups[one.a.shape, one.b.shape].append(one)
    return list(groups.values())


def score(groups: Sequence[Sequence[SVDTriplets]]) -> Tensor:
    """Return the importance s(E) + mean s(P) + mean s(Q) of each triplet, in one row, layer after layer."""
    ordered = [one for group in groups for one in group]
    entries = as_contiguous_view(ordered, "mean") * as_contiguous_view(ordered, "spread")
    scores, start = [], 0
    for group in groups:  # one reduction for all layers of a shape
        size = group[0].mean.numel()
        a, b, e = group[0].split_factors(entries[start : start + len(group) * size].view(len(group), size))
        scores.append((e + a.mean(-1) + b.mean(-2)).view(-1))
        start += len(group) * size
    return torch.cat(scores)


def as_contiguous_view(found: Sequence[SVDTriplets], name: str) -> Tensor:
    """Return the buffers of one name as one tensor that shares their memory; lays them out so where they are not."""
    buffers = [cast(Tensor, one._buffers[name]) for one in found]
    first, sizes = buffers[0], [buffer.numel() for buffer in buffers]
    width, total = first.element_size(), sum(sizes)
    ends = itertools.accumulate(sizes, initial=0)
    neighbours = all(b.data_ptr() == first.data_ptr() + width * end for b, end in zip(buffers, ends, strict=False))
    if neighbours and first.untyped_storage().nbytes() >= width * (first.storage_offset() + total):
        return first.as_strided((total,), (1,))
    row = torch.cat(buffers)
    memory, starts = row.untyped_storage(), itertools.accumulate(sizes, initial=0)
    for one, start, size in zip(found, starts, sizes, strict=False):
        # No view, so that it may be written anywhere.
        setattr(one, name, row.new_empty(0).set_(memory, start, (size,), (1,)))
    return row
