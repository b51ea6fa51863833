"""Triplets of a singular-value-like decomposition: what they are, how they are scored, which of them are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import parameter_like
from .low_rank import LowRankUpdate

_FACTORS = ("a", "b", "e")


class Triplets(LowRankUpdate):
    """scale P diag(E) Q, with Q (rank, in, *kernel) as ``a``, P (out, rank) as ``b`` and E (rank,) as ``e``.

    Buffers hold the moving averages of each entry's sensitivity and of its deviation, and which triplets are kept.

    Args:
        host: Layer to update.
        rank: Number of triplets.
        scale: Factor of the update.
        dropout: Probability with which inputs are dropped in training; not where inputs are indices.
        part: Rows of a fused layer to update.
    """

    def __init__(
        self, host: Any, rank: int, scale: float, dropout: float = 0.0, part: tuple[str, int, int] | None = None
    ) -> None:
        super().__init__(host, part)
        out, *rest = self.shape
        self.scale, self.dropout = scale, 0.0 if self.layer.looks_up else dropout
        for name, shape in zip(_FACTORS, ((rank, *rest), (out, rank), (rank,)), strict=True):
            factor = parameter_like(self.layer.parameter(host), *shape)
            self.register_parameter(name, factor)
            self.register_buffer(f"{name}_mean", torch.empty_like(factor))
            self.register_buffer(f"{name}_spread", torch.empty_like(factor))
        self.kept = nn.Buffer(torch.empty_like(self.e))
        self.reset_parameters()

    a: nn.Parameter
    b: nn.Parameter
    e: nn.Parameter

    def reset_parameters(self) -> None:
        """Start at no update: P and Q normal with deviation 0.02 as in the authors' code, E zero."""
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)
        for tensor in (self.e, *(self.get_buffer(f"{n}_{kind}") for n in _FACTORS for kind in ("mean", "spread"))):
            nn.init.zeros_(tensor)
        nn.init.ones_(self.kept)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.a * self.e.view(-1, *[1] * (self.a.dim() - 1)), self.b

    def sources(self) -> Sequence[Tensor]:
        return self.a, self.b, self.e

    def pack(self) -> dict[str, Tensor]:
        """Return the triplets that are kept, alone."""
        if self.kept.is_meta:  # nobody knows which
            return {name: self.get_parameter(name) for name in _FACTORS}
        live = (self.kept != 0) | (self.e.detach() != 0)
        return {"a": self.a.detach()[live], "b": self.b.detach()[:, live], "e": self.e.detach()[live]}

    def unpack(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a whole state without averages: triplets that were left out have no influence, but can grow."""
        state = {name: torch.zeros_like(value) for name, value in self.state_dict().items()}
        factors = {name: self.get_parameter(name).detach().clone() for name in ("a", "b")}
        factors["e"] = state.pop("e")
        count = packed["e"].numel() if "e" in packed else -1
        fits = {"a": (count, *self.a.shape[1:]), "b": (len(self.b), count), "e": (count,)}
        if count > len(self.e) or {name: tuple(value.shape) for name, value in packed.items()} != fits:
            return {name: value for name, value in state.items() if name not in _FACTORS} | dict(packed)  # refused
        for name, value in packed.items():
            factors[name][(slice(None), slice(count)) if name == "b" else slice(count)] = value
        state["kept"][:count] = 1
        return state | factors

    def scores(self) -> Tensor:
        """Return the importance of each triplet, of shape (rank,)."""
        a, b, e = (self.get_buffer(f"{name}_mean") * self.get_buffer(f"{name}_spread") for name in _FACTORS)
        return e + a.flatten(1).mean(1) + b.mean(0)

    def extra_repr(self) -> str:
        rank = len(self.e) if self.kept.is_meta else int(self.kept.sum())
        return f"rank={rank} of {len(self.e)}, scale={self.scale:g}"


def observe(found: Sequence[Triplets], beta1: float, beta2: float) -> None:
    """Take the sensitivities |w dL/dw| of one step into the averages; a step without finite gradients is no step."""
    named = [(one, name, one.get_parameter(name)) for one in found for name in _FACTORS]
    used = [(one, name, p, p.grad) for one, name, p in named if p.grad is not None]
    if not used:
        return
    gradients = [gradient for *_, gradient in used]
    if not torch.stack(torch._foreach_norm(gradients, torch.inf)).isfinite().all():
        return  # a gradient scaler has skipped this step
    means = [one.get_buffer(f"{name}_mean") for one, name, *_ in used]
    spreads = [one.get_buffer(f"{name}_spread") for one, name, *_ in used]
    sensitivities = torch._foreach_mul([p.detach() for _, _, p, _ in used], gradients)
    torch._foreach_abs_(sensitivities)
    torch._foreach_lerp_(means, sensitivities, 1 - beta1)
    torch._foreach_sub_(sensitivities, means)
    torch._foreach_abs_(sensitivities)
    torch._foreach_lerp_(spreads, sensitivities, 1 - beta2)


def allocate(found: Sequence[Triplets], budget: int) -> None:
    """Keep the ``budget`` best triplets of all, and set E of the others to zero."""
    scores = torch.cat([one.scores() for one in found])
    kept = torch.zeros_like(scores)
    kept[scores.topk(budget).indices] = 1
    for one, part in zip(found, torch.split(kept, [len(one.e) for one in found]), strict=True):
        one.kept.copy_(part)
        one.e.mul_(part)
