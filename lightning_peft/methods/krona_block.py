"""``KronABlock``: KronA beside whole feed-forward blocks (KronA^B, KronA^B_res), https://arxiv.org/abs/2212.10650."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, parameter_like
from ..core.method import Method
from .families.kronecker import add_kronecker, check_kronecker, shape_of_a, start_factors
from .families.parallel_branch import FEEDFORWARD, Block, ParallelBranch, feedforward_blocks


@dataclass(frozen=True, kw_only=True)
class KronABlock(Method):
    """Trains Y = FFN(X) + s X (A kron B), and + s_res X with ``residual``, beside each feed-forward block.

    These are KronA^B and KronA^B_res of the paper. The block is not linear, so the adapter cannot be merged. In a block
    found by its layers, the branch is added to the down-projection's output, before a dropout that may follow. With
    ``residual`` the learned scalar s_res starts at 1, so that an adapted model does not start as its base.

    Args:
        name: Name of the adapters on their hosts, and in files.
        targets: ``feedforward`` for the up- and down-projections of all blocks, or globs of modules that are blocks.
        exclude: Globs of modules to leave out, with all blocks inside them.
        shape_a: a1 and a2, divisors of the block's width.
        factor: In place of ``shape_a``: a1 and a2 are the largest divisors up to this.
        scale: Factor s of the update; 16 is a third party's default, not one from the paper.
        residual: Whether the block's input is added as well, times a learned scalar.

    Raises:
        ValueError: ``shape_a`` does not divide a block's width, or a block returns another width than it takes.

    Examples:
        >>> block = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        >>> model = lp.inject(nn.ModuleDict({"block": block}), lp.KronABlock(factor=4, targets=["block"]))
        >>> lp.summary(model).trainable  # A (4, 4) and B (4, 4) beside the block
        32
    """

    name: str = "krona_block"
    targets: list[str] = dataclasses.field(default_factory=lambda: [FEEDFORWARD])
    exclude: list[str] = dataclasses.field(default_factory=list)
    shape_a: list[int] | None = None
    factor: int | None = None
    scale: float = 16.0
    residual: bool = False

    def __post_init__(self) -> None:
        check_kronecker(self.shape_a, self.factor, self.scale)

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        for block in feedforward_blocks(model, self.targets, self.exclude):
            shape = shape_of_a(block.name, block.width, block.width, self.shape_a, self.factor)
            yield from block.adapters(KronABranch(block, shape, self.scale, self.residual))


class KronABranch(ParallelBranch):
    """s x (A kron B) + s_res x, with A of shape (a1, a2), B of shape (b1, b2) and s_res of shape (1,) or absent."""

    def __init__(self, block: Block, shape_a: tuple[int, int], scale: float, residual: bool) -> None:
        super().__init__()
        self.scale = scale
        self.a = parameter_like(block.weight, *shape_a)
        self.b = parameter_like(block.weight, *(block.width // side for side in shape_a))
        self.residual = parameter_like(block.weight, 1) if residual else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start_factors(self.a, self.b)
        if self.residual is not None:
            nn.init.ones_(self.residual)

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        if self.residual is not None:
            y = torch.addcmul(y, self.residual.to(y.dtype), x.to(y.dtype))
        return add_kronecker(y, x, self.a, self.b, self.scale)

    def extra_repr(self) -> str:
        return f"a={tuple(self.a.shape)}, b={tuple(self.b.shape)}, scale={self.scale:g}"
