"""``SVDTriplets``: updates P diag(E) Q; ``observe`` and ``allocate`` score triplets and keep the best of all layers."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.adapter import has_values, parameter_like
from ...ops.torch_api import flat
from ...structure.rows import Rows
from .low_rank import LowRankUpdate

_FACTORS = ("a", "b", "e")


class SVDTriplets(LowRankUpdate):
    """scale P diag(E) Q, with Q (rank, in, *kernel) as ``a``, P (out, rank) as ``b`` and E (rank,) as ``e``.

    Buffers hold the moving averages of each entry's sensitivity and of its deviation, and a mask of kept triplets.

    Args:
        host: Layer to update.
        rank: Number of triplets.
        scale: Factor of the update.
        dropout: Probability with which inputs are dropped in training; ignored where inputs are indices.
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
        """Start with an update of zero: P and Q normal with deviation 0.02 as in the authors' code, E zero."""
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
        """Return the kept triplets only."""
        if not has_values(self.kept):  # the mask is not known
            return {name: self.get_parameter(name) for name in _FACTORS}
        live = (self.kept != 0) | (self.e.detach() != 0)
        return {"a": self.a.detach()[live], "b": self.b.detach()[:, live], "e": self.e.detach()[live]}

    def import_state(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a full state with zero averages: triplets that were left out have E = 0, but can grow in training."""
        device = "cpu" if self.kept.is_meta else None
        state = {name: torch.zeros_like(value, device=device) for name, value in self.state_dict().items()}
        factors = {n: state[n] if device else self.get_parameter(n).detach().clone() for n in ("a", "b")}
        factors["e"] = state.pop("e")
        count = packed["e"].numel() if "e" in packed else -1
        fits = {"a": (count, *self.a.shape[1:]), "b": (len(self.b), count), "e": (count,)}
        if count > len(self.e) or {name: tuple(value.shape) for name, value in packed.items()} != fits:
            # Loading refuses these shapes, with a message that names the tensors.
            return {name: value for name, value in state.items() if name not in _FACTORS} | dict(packed)
        for name, value in packed.items():
            factors[name][(slice(None), slice(count)) if name == "b" else slice(count)] = value
        state["kept"][:count] = 1
        return state | factors

    def split_factors(self, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split entries of shape (..., all) into (..., rank, -1) of Q, (..., out, rank) of P and (..., rank) of E."""
        rank = len(self.e)
        a, b, e = torch.split(entries, [factor.numel() for factor in self.factor_tensors()], -1)
        return a.unflatten(-1, (rank, -1)), b.unflatten(-1, (-1, rank)), e  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        rank = int(self.kept.sum()) if has_values(self.kept) else len(self.e)
        return f"rank={rank} of {len(self.e)}, scale={self.scale:g}"


def observe(layers: Sequence[SVDTriplets], beta1: float, beta2: float) -> None:
    """Update the averages by the sensitivities |w dL/dw| of one step, unless a gradient is not finite.

    All entries form one row, for a few large operations instead of several for each tensor.
    """
    ordered = [layer for group in group_by_shape(layers) for layer in group]
    factors = [factor for layer in ordered for factor in layer.factor_tensors()]
    gradients = [torch.zeros_like(f) if f.grad is None else f.grad for f in factors]
    sensitivities = flat(gradients)
    # Where a gradient scaler has skipped the step, weights of 0 keep the averages; no device waits to read which it is.
    finite = sensitivities.sum().isfinite().to(sensitivities.dtype)
    sensitivities.mul_(flat(factors)).abs_().nan_to_num_()
    means, spreads = as_contiguous_view(ordered, "mean"), as_contiguous_view(ordered, "spread")
    means.lerp_(sensitivities, finite * (1 - beta1))
    spreads.lerp_(sensitivities.sub_(means).abs_(), finite * (1 - beta2))


def allocate(layers: Sequence[SVDTriplets], budget: int) -> None:
    """Keep the ``budget`` best triplets of all layers, and set E of the others to zero."""
    groups = group_by_shape(layers)
    ordered = [layer for group in groups for layer in group]
    scores = score(groups)
    kept = torch.zeros_like(scores).scatter_(0, scores.topk(budget).indices, 1)
    masks = list(torch.split(kept, [layer.e.numel() for layer in ordered]))
    torch._foreach_copy_([layer.kept for layer in ordered], masks)
    torch._foreach_mul_([layer.e for layer in ordered], masks)


def group_by_shape(layers: Sequence[SVDTriplets]) -> list[list[SVDTriplets]]:
    """Return the layers in groups of equal shapes."""
    groups = defaultdict[tuple[Any, ...], list[SVDTriplets]](list)
    for layer in layers:
        groups[layer.a.shape, layer.b.shape].append(layer)
    return list(groups.values())


def score(groups: Sequence[Sequence[SVDTriplets]]) -> Tensor:
    """Return the importance s(E) + mean s(P) + mean s(Q) of each triplet, in one row, layer after layer."""
    ordered = [layer for group in groups for layer in group]
    entries = as_contiguous_view(ordered, "mean") * as_contiguous_view(ordered, "spread")
    scores, start = [], 0
    for group in groups:  # one reduction for all layers of a shape
        size = group[0].mean.numel()
        a, b, e = group[0].split_factors(entries[start : start + len(group) * size].view(len(group), size))
        scores.append((e + a.mean(-1) + b.mean(-2)).view(-1))
        start += len(group) * size
    return torch.cat(scores)


def as_contiguous_view(layers: Sequence[SVDTriplets], name: str) -> Tensor:
    """Return the buffers of one name as one tensor that shares their memory; moves them into one storage if needed."""
    buffers = [cast(Tensor, layer._buffers[name]) for layer in layers]
    first, sizes = buffers[0], [buffer.numel() for buffer in buffers]
    width, total = first.element_size(), sum(sizes)
    ends = itertools.accumulate(sizes, initial=0)
    neighbours = all(b.data_ptr() == first.data_ptr() + width * end for b, end in zip(buffers, ends, strict=False))
    if neighbours and first.untyped_storage().nbytes() >= width * (first.storage_offset() + total):
        return first.as_strided((total,), (1,))
    row = torch.cat(buffers)
    memory, starts = row.untyped_storage(), itertools.accumulate(sizes, initial=0)
    for layer, start, size in zip(layers, starts, sizes, strict=False):
        # A tensor over the storage, and not a view of ``row``, can be written in place in any gradient mode.
        setattr(layer, name, row.new_empty(0).set_(memory, start, (size,), (1,)))
    return row
