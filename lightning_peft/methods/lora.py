"""``LoRA``: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, parameter_like
from ..core.method import Method, check_setting
from ..ops.fused_linear import WeightUpdateSpec
from ..ops.parametrizations import DoRAParametrization, LowRankParametrization, magnitude_over_norm
from ..ops.sharded_tensors import full_tensor
from ..structure.base_model import matches
from ..structure.rows import Rows
from .families.expert_low_rank import expert_adapters
from .families.low_rank import FROM_WEIGHT, RANDOM, LowRankUpdate
from .families.low_rank_targets import check_low_rank, check_patterns, select_low_rank

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Trains W + (alpha / rank) B A instead of W, with A (rank, in) and B (out, rank); B starts at zero.

    LoRA adapts linear layers, GPT-2's Conv1D, convolutions, embeddings, torch's attention and, without ``decompose``,
    experts in 3-D parameters, each with a pair of its own. A layer that computes query, key and value at once has a
    pair for each part that a role selects; selected by a glob, it has one for all its rows. The factors are called
    ``<name>.a`` and ``<name>.b``: with ``PEFTStrategy(lr_factors={"lora.b": 16})`` B learns faster (LoRA+,
    https://arxiv.org/abs/2402.12354), with ``{"lora.a": 0}`` A stays as it starts and needs neither gradient nor saved
    inputs (LoRA-FA, https://arxiv.org/abs/2308.03303).

    Args:
        name: Name of the adapters on their hosts, and in files.
        targets: Globs on the end of module names, or roles; the paper adapts query and value projections.
        exclude: Globs of modules to leave out.
        rank: Rank r of the update, at most the smaller side of the weight.
        alpha: The update is scaled by alpha / rank; 16 as in the authors' scripts for GLUE.
        scaling: ``rank_stabilized`` scales by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732.
        init: How A and B start. ``kaiming``: A uniform as in the authors' code, B zero. ``gaussian``: A normal with
            deviation 1 / rank. ``orthogonal``: both random, in orthogonal spaces. ``pissa``: the weight's largest
            singular values (https://arxiv.org/abs/2404.02948), ``olora``: its QR factors
            (https://arxiv.org/abs/2406.01775); the update, not the base, is without their product at the start.
        decompose: Whether the length of the updated rows trains apart (DoRA, https://arxiv.org/abs/2402.09353).
        dropout: Probability with which inputs of A are dropped in training.
        rank_pattern: Ranks that differ from ``rank``, by glob of hosts.
        alpha_pattern: Alphas that differ from ``alpha``, by glob of hosts.
    """

    name: str = "lora"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention.query", "attention.value"])
    exclude: list[str] = dataclasses.field(default_factory=list)
    rank: int = 8
    alpha: float = 16.0
    scaling: Literal["standard", "rank_stabilized"] = "standard"
    init: Init = "kaiming"
    decompose: bool = False
    dropout: float = 0.0
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            check_setting(type(rank) is int and rank > 0, "rank", rank, "a positive whole number")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            check_setting(math.isfinite(alpha) and alpha > 0, "alpha", alpha, "a positive number")
        check_setting(0 <= self.dropout < 1, "dropout", self.dropout, "a probability in [0, 1)")
        known = self.scaling in ("standard", "rank_stabilized")
        check_setting(known, "scaling", self.scaling, "one of standard, rank_stabilized")
        check_setting(self.init in get_args(Init), "init", self.init, f"one of {', '.join(get_args(Init))}")

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        # DoRA would need the length of each row of W + B A, which is never added up for experts.
        selected = select_low_rank(model, self.targets, self.exclude, self._rank, experts=not self.decompose)
        check_patterns(selected, {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern})
        for name, host, rows in selected.layers:
            check_low_rank(name, host, rank := self._rank(name), self.dropout)
            scale = self._scale(name, rank)
            yield name, LoRAAdapter(host, rank, scale, self.dropout, rows, self.init, self.decompose)
        yield from expert_adapters(selected.experts, self._rank, self._scale, self.dropout, self.init)

    def pair_of(self, host: str, packed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        if packed["b"].dim() > 2:
            return None  # a pair for each expert
        a, b, scale = packed["a"].flatten(1), packed["b"], self._scale(host, len(packed["a"]))
        if self.init in FROM_WEIGHT:
            a, b = torch.cat([a, packed["a0"].flatten(1)]), torch.cat([b, -packed["b0"]], 1)
        return a, b * scale

    def _rank(self, host: str) -> int:
        return next((r for p, r in self.rank_pattern.items() if matches(host, p)), self.rank)

    def _scale(self, host: str, rank: int) -> float:
        alpha = next((a for p, a in self.alpha_pattern.items() if matches(host, p)), self.alpha)
        return alpha / (rank if self.scaling == "standard" else math.sqrt(rank))


class LoRAAdapter(LowRankUpdate):
    """scale B A, with A of shape (rank, in, *kernel) and B of shape (out, rank).

    Where both factors start from the weight, their product at the start is subtracted: scale (B A - B0 A0), so that the
    stored base is unchanged. With a magnitude m of shape (out,) the updated weight V becomes m V / ||V||, row by row.

    Args:
        host: Layer to update.
        rank: Rank of the update.
        scale: Factor of the update.
        dropout: Probability with which inputs are dropped in training; ignored where inputs are indices.
        rows: Rows of a fused layer to update.
        init: How the factors start; see ``LoRA``.
        decompose: Whether a magnitude is trained as well.
    """

    tensor_parallel_dims = {
        "a": (None, "in"),
        "a0": (None, "in"),
        "b": ("out", None),
        "b0": ("out", None),
        "magnitude": ("out",),
    }

    def __init__(
        self,
        host: Any,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        rows: Rows | None = None,
        init: Init = "kaiming",
        decompose: bool = False,
    ) -> None:
        super().__init__(host, scale, dropout, rows)
        out, *rest = self.shape
        self.init = init
        self.exclusive = decompose or self.updates_bias
        weight = self.layer.parameter(host)
        self.a, self.b = parameter_like(weight, rank, *rest), parameter_like(weight, out, rank)
        if init in FROM_WEIGHT:
            self.a0, self.b0 = (nn.Buffer(torch.empty_like(factor)) for factor in (self.a, self.b))
        self.magnitude = parameter_like(weight, out) if decompose else None
        self.reset_parameters(host)

    def reset_parameters(self, host: Any = None) -> None:
        """Start with an update of zero; ``host`` is needed where the start depends on its weight."""
        if self.init in RANDOM and not self.a.is_meta:
            RANDOM[self.init](self.a, self.b, self.layer.is_embedding)
        if self.init in FROM_WEIGHT or self.magnitude is not None:
            self._start_from(host)

    @torch.no_grad()
    def _start_from(self, host: Any) -> None:
        if self.a.is_meta:
            return  # loading fills them, or this is called again once they have storage
        if host is None:
            raise TypeError(
                "decompose and the initial values pissa and olora are computed from the host's weight: load the base "
                "model first, then inject."
            )
        weight = self.rows.take(full_tensor(self.layer.read(host))).to(self.a.dtype).flatten(1)
        if self.init in FROM_WEIGHT:
            a, b = FROM_WEIGHT[self.init](weight, len(self.a), self.scale)
            for factor, value in ((self.a, a), (self.a0, a), (self.b, b), (self.b0, b)):
                factor.copy_(value.view(factor.shape))
        if self.magnitude is not None:
            # By the operator of the forward pass, so that the norm is equal to the last bit.
            v = LowRankParametrization(self.scale).updated(weight, self.a.flatten(1), self.b * 0)
            self.magnitude.copy_(torch.linalg.vector_norm(v, dim=1))

    def pair(self) -> tuple[Tensor, Tensor]:
        if self.init in FROM_WEIGHT:
            return torch.cat([self.a, self.a0]), torch.cat([self.b, -self.b0], 1)
        return self.a, self.b

    def updated(self, weight: Tensor) -> Tensor:
        v = weight + self.delta()
        if self.magnitude is None:
            return v
        return v * magnitude_over_norm(v, self.magnitude).view(-1, *[1] * (v.dim() - 1))

    def update(self, host: Any, x: Tensor) -> Tensor:
        if self.magnitude is None:
            return super().update(host, x)
        weight = self.rows.take(self.layer.read(host)).to(self.a.dtype)
        change = self.updated(weight) - weight
        return self.layer.apply(host, self.dropped(x), change.to(x.dtype) if x.is_floating_point() else change)

    def as_parametrization(self) -> WeightUpdateSpec | None:
        update = super().as_parametrization()
        if update is None or self.magnitude is None:
            return update
        return WeightUpdateSpec(DoRAParametrization(self.scale), self.rows.ends, (*update.factors, self.magnitude))

    def extra_repr(self) -> str:
        return f"rank={len(self.a)}, scale={self.scale:g}, dropout={self.dropout:g}"
