"""``AdaLoRA``: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, https://arxiv.org/abs/2303.10512."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Method, check_setting
from .families.low_rank_targets import check_low_rank, select_low_rank
from .families.svd_triplets import SVDTriplets, allocate, observe


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Trains W + (alpha / initial_rank) P diag(E) Q and moves ranks to where they matter, under a shrinking budget.

    A triplet is one entry of E with its column of P and row of Q. Its score is s(E) + mean s(P) + mean s(Q), where s is
    the moving average of |w dL/dw| times that of its deviation. After each ``interval`` steps the best triplets of all
    layers are kept and E of the others is set to zero; the number kept falls from initial_rank to target_rank per layer
    as the cube of the remaining time. In the last ``final_steps`` the choice is fixed. The number of steps comes from
    the Trainer; in manual optimization it is estimated from the steps so far. The penalty is, as in the authors' code,
    the mean of ||P^T P - I|| and ||Q Q^T - I|| over all layers; it is added to gradients only and does not appear in
    the loss.

    Args:
        name: Name of the adapters on their hosts, and in files.
        targets: Globs on the end of module names, or roles. The paper adapts all linear layers of the blocks.
        exclude: Globs of modules to leave out.
        initial_rank: Rank of each layer at the start; the paper takes 1.5 times the target.
        target_rank: Mean rank of a layer at the end.
        alpha: The update is scaled by alpha / initial_rank.
        dropout: Probability with which inputs are dropped in training.
        warmup_steps: Optimizer steps before the budget shrinks; a tenth of all by default.
        final_steps: Optimizer steps after the budget has reached the target; three tenths of all by default.
        interval: Optimizer steps between two allocations.
        beta1: Decay of the average of sensitivities.
        beta2: Decay of the average of their deviations.
        orthogonal_weight: Factor of the penalty; the paper uses 0.1, 0.3 and 0.5.

    Raises:
        ValueError: Training has no last step, or is too short for ``warmup_steps`` and ``final_steps``.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        >>> method = lp.AdaLoRA(initial_rank=6, target_rank=4, targets=["0", "2"])
        >>> lp.summary(lp.inject(model, method)).trainable  # 2 layers of 6 triplets of 16 + 1 + 16
        396
        >>> [method.budget(step, 100, layers=2) for step in (0, 40, 100)]  # triplets that are kept after a step
        [12, 8, 8]
    """

    name: str = "adalora"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all-linear"])
    exclude: list[str] = dataclasses.field(default_factory=list)
    initial_rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    warmup_steps: int | None = None
    final_steps: int | None = None
    interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal_weight: float = 0.1

    def __post_init__(self) -> None:
        for field in ("initial_rank", "target_rank", "interval"):
            value = getattr(self, field)
            check_setting(type(value) is int and value > 0, field, value, "a positive whole number")
        check_setting(self.target_rank <= self.initial_rank, "target_rank", self.target_rank, "at most initial_rank")
        for field in ("warmup_steps", "final_steps"):
            value = getattr(self, field)
            check_setting(value is None or (type(value) is int and value >= 0), field, value, "a whole number or None")
        check_setting(math.isfinite(self.alpha) and self.alpha > 0, "alpha", self.alpha, "a positive number")
        for field in ("dropout", "beta1", "beta2"):
            check_setting(0 <= getattr(self, field) < 1, field, getattr(self, field), "in [0, 1)")
        weight = self.orthogonal_weight
        check_setting(math.isfinite(weight) and weight >= 0, "orthogonal_weight", weight, "a number, not negative")

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, SVDTriplets]]:
        selected = select_low_rank(model, self.targets, self.exclude, lambda name: self.initial_rank)
        for name, host, rows in selected.layers:
            check_low_rank(name, host, self.initial_rank, self.dropout, "initial_rank")
            yield name, SVDTriplets(host, self.initial_rank, self._scale, self.dropout, rows)

    @property
    def _scale(self) -> float:
        return self.alpha / (self.initial_rank + 1e-5)

    def pair_of(self, host: str, packed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        live = (packed["e"] != 0) | (packed.get("kept", packed["e"]) != 0)
        return packed["a"][live].flatten(1), packed["b"][:, live] * packed["e"][live] * self._scale

    def check_run(self, total_steps: int) -> None:
        if total_steps < 0:
            raise ValueError("AdaLoRA's budget shrinks until the last step: give the Trainer max_epochs or max_steps.")
        start, stop = self._phases(total_steps)
        check_setting(
            start < stop, "warmup_steps + final_steps", total_steps - stop + start, f"below {total_steps} steps"
        )

    def budget(self, step: int, total_steps: int, layers: int) -> int:
        """Return how many triplets of all ``layers`` are kept after an optimizer step."""
        start, stop = self._phases(total_steps)
        left = min(1.0, max(0.0, 1 - (step - start) / max(1, stop - start)))  # 1: fast_dev_run
        return int(layers * self.target_rank + layers * (self.initial_rank - self.target_rank) * left**3)

    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        if not self.orthogonal_weight:
            return None
        by_shape = defaultdict[torch.Size, list[Tensor]](list)
        for adapter in cast("Sequence[SVDTriplets]", adapters):
            for factor in (adapter.a.flatten(1), adapter.b.T):
                by_shape[factor.shape].append(factor)
        norms = []
        for factors in by_shape.values():  # one product for all factors of a shape
            rows = torch.stack(factors)
            identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
            norms.append(torch.linalg.matrix_norm(rows @ rows.mT - identity))
        return self.orthogonal_weight * torch.cat(norms).mean()

    @torch.no_grad()
    def after_step(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> None:
        layers = cast("Sequence[SVDTriplets]", adapters)
        start, stop = self._phases(total_steps)
        if step < stop:
            observe(layers, self.beta1, self.beta2)
        # From then on the choice stays the same, as scores do; it is made anew since in manual optimization the number
        # of all steps is an estimate, which may pass over the very step at which the budget has shrunk.
        if step >= stop or (step > start and step % self.interval == 0):
            allocate(layers, self.budget(step, total_steps, len(layers)))

    def metrics(self, adapters: Mapping[str, Adapter]) -> Mapping[str, Tensor]:
        layers = cast("Mapping[str, SVDTriplets]", adapters)
        ranks = {name: layer.kept.sum().float() for name, layer in layers.items()}
        total = torch.stack(list(ranks.values())).sum()
        return {f"{self.name}/total_rank": total, **{f"{self.name}/rank/{name}": rank for name, rank in ranks.items()}}

    def _phases(self, total_steps: int) -> tuple[int, int]:
        """Return the steps after which the budget begins to shrink and has shrunk."""
        warmup = total_steps // 10 if self.warmup_steps is None else self.warmup_steps
        final = total_steps * 3 // 10 if self.final_steps is None else self.final_steps
        return warmup, total_steps - final
