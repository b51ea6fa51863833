"""``ParallelAdapter``: Towards a Unified View of Parameter-Efficient Transfer Learning, https://arxiv.org/abs/2110.04366."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..core.adapter import Adapter, parameter_like
from ..core.method import Method, check_setting
from .families.bottleneck_mlp import add_bottleneck, check_bottleneck
from .families.parallel_branch import FEEDFORWARD, Block, ParallelBranch, feedforward_blocks


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Method):
    """Adds s W_up relu(W_down x) beside each feed-forward block, for the block's input x.

    W_up starts at zero, so that an adapted model starts as its base. MAM adapters of the paper are
    ``[PrefixTuning(length=30), ParallelAdapter(size=512)]``. In a block found by its layers, the result is added to
    the down-projection's output, before a dropout that may follow. It cannot be merged.

    Args:
        name: Name of the adapters on their hosts, and in files.
        size: Number r of features between the two layers.
        scale: Factor s; 4 in the paper's summarization and translation, 2 in its script for GLUE.
        activation: ``relu``, ``gelu`` or ``swish``.
        dropout: Probability with which activations are dropped in training.
        bias: Whether both layers have biases, as in the authors' code; scaled with the rest.
        targets: ``feedforward`` for the up- and down-projections of all blocks, or globs of modules that are blocks.
        exclude: Globs of modules to leave out, with all blocks inside them.

    Raises:
        ValueError: A block returns another width than it takes.

    Examples:
        >>> block = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        >>> model = lp.inject(nn.ModuleDict({"block": block}), lp.ParallelAdapter(size=8, targets=["block"]))
        >>> lp.summary(model).trainable  # W_down (8, 16) and W_up (16, 8) beside the block
        256
    """

    name: str = "parallel_adapter"
    size: int = 512
    scale: float = 4.0
    activation: str = "relu"
    dropout: float = 0.0
    bias: bool = False
    targets: list[str] = dataclasses.field(default_factory=lambda: [FEEDFORWARD])
    exclude: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        check_bottleneck(self.size, self.activation)
        check_setting(self.scale != 0, "scale", self.scale, "a factor other than 0")
        check_setting(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 up to, but not, 1")

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        for block in feedforward_blocks(model, self.targets, self.exclude):
            yield from block.adapters(ParallelBottleneck(block, self))


class ParallelBottleneck(ParallelBranch):
    """up dropout(phi(down x + down_bias)) + up_bias, with ``down`` (size, width) and ``up`` (width, size)."""

    def __init__(self, block: Block, method: ParallelAdapter) -> None:
        super().__init__()
        self.factor, self.activation, self.dropout = method.scale, method.activation, method.dropout
        self.down = parameter_like(block.weight, method.size, block.width)
        self.up = parameter_like(block.weight, block.width, method.size)
        self.down_bias = parameter_like(block.weight, method.size) if method.bias else None
        self.up_bias = parameter_like(block.weight, block.width) if method.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)
        for bias in (self.down_bias, self.up_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        down, up = (self.down, self.down_bias), (self.up, self.up_bias)
        return add_bottleneck(y, x, down, up, self.activation, self.factor, self.dropout if self.training else 0.0)

    def extra_repr(self) -> str:
        return f"size={len(self.down)}, scale={self.factor:g}, activation={self.activation}"
