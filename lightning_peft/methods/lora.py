"""LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import WeightUpdate, parameter_like
from ..layers import layer_of
from ..method import Method, require
from ..select import matches, parts, select


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Trains W + (alpha / rank) B A instead of W, with A (rank, in) and B (out, rank); B starts at zero.

    Acts on linear layers, GPT-2's Conv1D, convolutions and embeddings. A layer that computes query, key and value at
    once has an own pair for each part that a role asks for; named by a glob it has one pair for all its rows.

    Args:
        name: Name of the adapters on their hosts, and in files.
        targets: Globs on the end of module names, or roles. The paper adapts the query and value projections.
        exclude: Globs of modules to leave out.
        rank: Rank r of the update, at most the smaller side of the weight.
        alpha: The update is scaled by alpha / rank; 16 as in the authors' scripts for GLUE.
        dropout: Probability with which inputs of A are dropped in training.
        rank_pattern: Other ranks for some hosts, by glob.
        alpha_pattern: Other alphas for some hosts, by glob.
    """

    name: str = "lora"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention.query", "attention.value"])
    exclude: list[str] = dataclasses.field(default_factory=list)
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            require(type(rank) is int and rank > 0, "rank", rank, "a positive whole number")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            require(math.isfinite(alpha) and alpha > 0, "alpha", alpha, "a positive number")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a probability in [0, 1)")

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, LoRAAdapter]]:
        hosts = select(model, self.targets, self.exclude)
        for field, pattern in [(f, p) for f in ("rank_pattern", "alpha_pattern") for p in getattr(self, f)]:
            require(
                any(matches(n, pattern) for n in hosts), field, pattern, f"a glob of a target, like {next(iter(hosts))}"
            )
        for name, host in hosts.items():
            rank = next((r for p, r in self.rank_pattern.items() if matches(name, p)), self.rank)
            alpha = next((a for p, a in self.alpha_pattern.items() if matches(name, p)), self.alpha)
            out, *rest = layer_of(host).shape(host)
            require(rank <= min(out, math.prod(rest)), f"rank at {name}", rank, f"at most {min(out, math.prod(rest))}")
            for part in (*parts(name, host, self.targets),) or (None,):
                yield name, LoRAAdapter(host, rank, alpha / rank, self.dropout, part)


class LoRAAdapter(WeightUpdate):
    """scale B A, with A of shape (rank, in, *kernel) and B of shape (out, rank).

    Args:
        host: Layer to update.
        rank: Rank of the update.
        scale: Factor of the update.
        dropout: Probability with which inputs are dropped in training; not where inputs are indices.
        part: Rows of a fused layer to update.
    """

    def __init__(
        self, host: Any, rank: int, scale: float, dropout: float, part: tuple[str, int, int] | None = None
    ) -> None:
        super().__init__(host, part)
        out, *rest = self.shape
        self.scale, self.dropout = scale, 0.0 if self.layer.looks_up else dropout
        self.a, self.b = parameter_like(host.weight, rank, *rest), parameter_like(host.weight, out, rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at no update: the factor that meets the input is random, unless that input is an index."""
        if self.layer.looks_up:
            nn.init.zeros_(self.a)
            nn.init.normal_(self.b)
        else:
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as the authors' code; the paper says Gaussian
            nn.init.zeros_(self.b)

    def delta(self) -> Tensor:
        return self.scale * (self.b @ self.a.flatten(1)).view(self.shape)

    def update(self, host: Any, x: Tensor) -> Tensor:
        if x.is_floating_point():
            x = x.to(self.a.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if not self.layer.factorizes(host):
            return self.layer.apply(host, x, self.delta())
        return self.layer.mix(host, self.layer.apply(host, x, self.a) * self.scale, self.b)

    def extra_repr(self) -> str:
        return f"rank={len(self.a)}, scale={self.scale:g}, dropout={self.dropout:g}"
