"""``LoRA``: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Method, check_setting
from ..structure.base_model import matches
from .families.expert_low_rank import expert_adapters
from .families.lora_adapter import Init, LoRAAdapter
from .families.low_rank_start import FROM_WEIGHT
from .families.low_rank_targets import check_low_rank, check_patterns, select_low_rank


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

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = lp.inject(model, lp.LoRA(rank=2, targets=["0"]))
        >>> {name: tuple(tensor.shape) for name, tensor in model.named_parameters() if tensor.requires_grad}
        {'0.peft.lora.a': (2, 16), '0.peft.lora.b': (8, 2)}
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
