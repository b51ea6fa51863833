"""``ExpertLowRankAdapter``: W_e + scale B_e A_e for each expert e of a module, added up in no call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, parameter_like
from ...core.method import check_setting
from ...ops.lazy_sum import LazySum, LowRankTerm
from ...ops.sharded_tensors import full_tensor
from ...structure.expert_layers import ExpertWeight
from ...structure.expert_probe import with_parameters
from ...structure.expert_selection import ExpertTarget
from .low_rank_start import FROM_WEIGHT, RANDOM


def expert_adapters(
    targets: Iterable[ExpertTarget],
    rank_of: Callable[[str], int],
    scale_of: Callable[[str, int], float],
    dropout: float,
    init: str,
) -> Iterator[tuple[str, ExpertLowRankAdapter]]:
    """Yield (host's name, adapter) for weights of experts, by whose names ranks and scales are asked."""
    for name, host, weight in targets:
        key = f"{name}.{weight.part}"
        rank, largest = rank_of(key), min(weight.shape(host))
        check_setting(rank <= largest, f"rank at {key}", rank, f"at most {largest}")
        yield name, ExpertLowRankAdapter(host, weight, rank, scale_of(key, rank), dropout, init)


class ExpertLowRankAdapter(Adapter):
    """scale B A for each expert, with A of shape (experts, rank, in) and B of shape (experts, out, rank).

    During a call the module reads a stand-in of its weight, whose product with tokens is W x + scale B (A x). Where
    both factors start from the weight, their product at the start is subtracted.

    Args:
        host: Module that holds the experts.
        weight: Which of its weights.
        rank: Rank of the update of each expert.
        scale: Factor of the update.
        dropout: Probability with which inputs of A are dropped in training.
        init: How the factors start; see ``LoRA``.
    """

    def __init__(
        self, host: Any, weight: ExpertWeight, rank: int, scale: float, dropout: float = 0.0, init: str = "kaiming"
    ) -> None:
        super().__init__()
        self.weight, self.part, self.scale, self.dropout, self.init = weight, weight.part, scale, dropout, init
        (out, features), experts = weight.shape(host), weight.experts(host)
        stored = weight.parameter(host)
        self.a = parameter_like(stored, experts, rank, features)
        self.b = parameter_like(stored, experts, out, rank)
        if init in FROM_WEIGHT:
            self.a0, self.b0 = (nn.Buffer(torch.empty_like(factor)) for factor in (self.a, self.b))
        self.reset_parameters(host)

    @torch.no_grad()
    def reset_parameters(self, host: Any = None) -> None:
        """Start with an update of zero; ``host`` is needed where the start depends on its weights."""
        if self.a.is_meta:
            return  # loading fills them, or this is called again once they have storage
        if self.init in RANDOM:
            for a, b in zip(self.a, self.b, strict=True):
                RANDOM[self.init](a, b, False)
            return
        if host is None:
            raise TypeError(
                "The initial values pissa and olora are computed from the host's weight: load the base model first, "
                "then inject."
            )
        for expert, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            weight = full_tensor(self.weight.read(host, expert)).to(a.dtype)
            for factor, value in zip((a, b), FROM_WEIGHT[self.init](weight, len(a), self.scale), strict=True):
                factor.copy_(value)
        self.a0.copy_(self.a)
        self.b0.copy_(self.b)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A and B, with what is subtracted as further ranks."""
        if self.init in FROM_WEIGHT:
            return torch.cat([self.a, self.a0], 1), torch.cat([self.b, -self.b0], 2)
        return self.a, self.b

    def forward(self, host: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
        return inner.on(with_parameters(host, {self.part: self.updated(host)}))(*args, **kwargs)

    def updated(self, host: Any) -> LazySum:
        """Return the sum of the weight as the host stores it, or of another sum, and the update."""
        a, b = self.pair()
        left, right = (a.mT, b.mT) if self.weight.transposed else (b, a)
        term = LowRankTerm(left, right, self.scale, self.dropout if self.training else 0.0)
        return LazySum(self.weight.factor(host), term)

    @torch.no_grad()
    def merge(self, host: Any) -> None:
        for expert, (a, b) in enumerate(zip(*self.pair(), strict=True)):
            weight = self.weight.read(host, expert)
            weight = weight.to(torch.promote_types(weight.dtype, a.dtype))
            self.weight.write(host, expert, weight + self.scale * (b @ a))

    def extra_repr(self) -> str:
        return f"weight={self.part}, rank={self.a.shape[1]}, scale={self.scale:g}, dropout={self.dropout:g}"
