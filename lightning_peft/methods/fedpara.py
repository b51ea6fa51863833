"""``FedPara``: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, https://arxiv.org/abs/2108.06098."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Method, check_setting
from ..structure.layer_of import layer_of
from ..structure.selection import select
from .families.hadamard import HadamardUpdate


@dataclass(frozen=True, kw_only=True)
class FedPara(Method):
    """Trains W + (X1 Y1^T) o (X2 Y2^T), whose rank reaches rank^2; pFedPara: W + (X1 Y1^T) o (X2 Y2^T + 1).

    The paper trains such weights from scratch; as an update, known as LoHa too, X1 starts at zero. A convolution has a
    core for each of the two: T1 x1 X1 x2 Y1. In pFedPara the first matrix is global, the second stays with its client:
    ``lp.global_state(module)`` and ``lp.local_state(module)``.

    Args:
        name: Name of the adapters on their hosts, and in files.
        targets: Globs on the end of module names, or roles. The paper factorizes convolutions and linear layers.
        exclude: Globs of modules to leave out.
        rank: Rank R of each matrix; 2 R (out + in) numbers train.
        gamma: Instead of a rank: R = (1 - gamma) R_min + gamma R_max for each layer, from the smallest R that allows
            full rank to the largest with no more numbers than the weight. The default is 0.
        tanh: Whether both matrices pass through tanh.
        personalized: Whether to train pFedPara.
        cores: Whether convolutions have cores; without them, a kernel's positions count as further inputs.
        jacobian_weight: Factor of the correction 1/2 ||W' - (W - step J)||^2, where J is the loss's gradient of the
            weight and W' is composed of the factors after one gradient step. It is added to gradients only; J is
            collected on each process by itself and costs the gradient of a full weight.
        jacobian_step: Size of that step; the paper's learning rate.

    Examples:
        >>> layer = lp.inject(nn.Sequential(nn.Linear(16, 16)), lp.FedPara(rank=4, targets=["0"]))
        >>> lp.summary(layer).trainable  # 2 x 4 x (16 + 16), for an update of rank up to 16
        256
        >>> client = lp.inject(nn.Sequential(nn.Linear(16, 16)), lp.FedPara(personalized=True, targets=["0"]))
        >>> sorted(lp.local_state(client))  # stays with its client
        ['0.peft.fedpara.x2', '0.peft.fedpara.y2']
    """

    name: str = "fedpara"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all-linear"])
    exclude: list[str] = dataclasses.field(default_factory=list)
    rank: int | None = None
    gamma: float | None = None
    tanh: bool = False
    personalized: bool = False
    cores: bool = True
    jacobian_weight: float = 0.0
    jacobian_step: float = 0.1

    def __post_init__(self) -> None:
        check_setting(self.rank is None or self.gamma is None, "rank and gamma", (self.rank, self.gamma), "one of both")
        check_setting(self.rank is None or (type(self.rank) is int and self.rank > 0), "rank", self.rank, "positive")
        check_setting(self.gamma is None or 0 <= self.gamma <= 1, "gamma", self.gamma, "in [0, 1]")
        for field in ("jacobian_weight", "jacobian_step"):
            value = getattr(self, field)
            check_setting(math.isfinite(value) and value >= 0, field, value, "a number, not negative")
        check_setting(
            not (self.tanh and self.personalized), "tanh", self.tanh, "False with personalized, as in the paper"
        )

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, HadamardUpdate]]:
        for name, host, rows in select(model, self.targets, self.exclude):
            out, features, *kernel = layer_of(host).shape(host, rows)
            rank = self.rank or self.rank_of(out, features, *kernel)
            largest = min(out, features if self.cores else features * math.prod(kernel))
            check_setting(rank <= largest, f"rank at {name}", rank, f"at most {largest}")
            shift = 1.0 if self.personalized else 0.0
            yield name, HadamardUpdate(host, rank, self.tanh, shift, self.cores, self.jacobian_weight > 0, rows)

    def rank_of(self, out: int, features: int, *kernel: int) -> int:
        """Return the rank that ``gamma`` gives for a weight of shape (out, features, *kernel)."""
        size, gamma = math.prod(kernel), self.gamma or 0.0
        columns, core = (features, size if kernel else 0) if self.cores else (features * size, 0)
        low = min(math.isqrt(out - 1), math.isqrt(columns - 1)) + 1  # both rounded up
        budget, sides = out * features * size / 2, out + columns  # R (sides + R core) <= budget
        high = int(budget / sides if not core else (math.sqrt(sides**2 + 4 * core * budget) - sides) / (2 * core))
        return int((1 - gamma) * low + gamma * max(low, high))

    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        if not self.jacobian_weight:
            return None
        terms = []
        for adapter in cast("Sequence[HadamardUpdate]", adapters):
            jacobian, adapter.jacobian = adapter.jacobian, None
            if jacobian is not None:
                factors = adapter.factors()
                update = adapter.composed(*factors)
                steps = torch.autograd.grad(update, factors, jacobian, create_graph=True)
                stepped = [f - self.jacobian_step * step for f, step in zip(factors, steps, strict=True)]
                expected = update - self.jacobian_step * jacobian
                terms.append((adapter.composed(*stepped) - expected).square().sum())
        return self.jacobian_weight / 2 * torch.stack(terms).sum() if terms else None
