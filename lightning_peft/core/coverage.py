"""``coverage``: how many blocks of each tower have adapters, and which share of the blocks' weights these adapt."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from torch import nn

from ..ops.sharded_tensors import global_shape
from ..structure.base_model import base_modules, is_inside, outwards
from ..structure.roles import ROLES
from ..structure.structure_of import structure_of
from ..structure.towers import towers
from .method import Method

_SHOWN = 3


class Coverage(NamedTuple):
    """Blocks of one tower with adapters.

    Args:
        tower: Name of the tower; empty for a model without several.
        adapted: Number of its blocks with adapters.
        untouched: Names of its other blocks.
        share: Share of the weights of its blocks that belong to modules with adapters.
    """

    tower: str
    adapted: int
    untouched: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        where = f" of {self.tower}" if self.tower else ""
        share = f"{100 * self.share:.3g} % of their weights"
        return f"{self.adapted} of {self.adapted + len(self.untouched)} blocks{where} ({share})"


def coverage(model: nn.Module, hosts: Iterable[str]) -> list[Coverage]:
    """Return the coverage of each tower that has blocks.

    Args:
        model: The model.
        hosts: Names of the modules with adapters.
    """
    hosts = set(hosts)
    weights, reached = dict.fromkeys(structure_of(model).names["blocks"], 0), dict[str, int]()
    for name, module in base_modules(model).items():
        if (block := _block_of(name, weights)) is not None:
            size = sum(global_shape(p).numel() for p in module._parameters.values() if p is not None)
            weights[block] += size
            if name in hosts:
                reached[block] = reached.get(block, 0) + size
    found = []
    for part in [tower for tower in towers(model) if tower] or [""]:
        blocks = [block for block in weights if is_inside(block, part)]
        untouched = tuple(block for block in blocks if block not in reached)
        share = sum(reached.get(block, 0) for block in blocks) / max(1, sum(weights[block] for block in blocks))
        found += [Coverage(part, len(blocks) - len(untouched), untouched, share)] if blocks else []
    return found


def _block_of(name: str, blocks: Collection[str]) -> str | None:
    """Return the block that a module is, or is inside of."""
    return next((outer for outer in outwards(name) if outer in blocks), None)


def warn_of_untouched_blocks(model: nn.Module, methods: Sequence[Method], hosts: Iterable[str]) -> None:
    """Warn where roles alone chose the hosts, and some blocks of a tower have adapters while others have none."""
    if any(_limits_blocks(method) for method in methods):
        return
    for part in coverage(model, hosts):
        if part.adapted and part.untouched:
            shown = ", ".join(part.untouched[:_SHOWN]) + (", ..." if len(part.untouched) > _SHOWN else "")
            warnings.warn(
                f"Adapters reach {part}: nothing in {shown} plays a role that is a target. Other targets, such as "
                f"all-linear, may reach it.",
                stacklevel=2,
            )


def _limits_blocks(method: Method) -> bool:
    """Return whether a method means some blocks alone: by names, or by their number."""
    by_name = not set(getattr(method, "targets", ())) <= {*ROLES, "feedforward"} or bool(getattr(method, "exclude", ()))
    return by_name or hasattr(method, "layers")
