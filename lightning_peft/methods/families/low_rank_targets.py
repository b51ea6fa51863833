"""``select_low_rank``: the layers, and weights of experts, that low-rank updates fit; and checks of their settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...core.method import check_setting
from ...structure.base_model import matches
from ...structure.expert_layers import described
from ...structure.expert_selection import Selected, select_with_experts
from ...structure.layer_of import layer_of
from ...structure.selection import select
from ...structure.towers import split_scope


def check_low_rank(name: str, host: nn.Module, rank: int, dropout: float, field: str = "rank") -> None:
    """Raise a ``ValueError`` for a rank above the sides of the weight, or dropout on a layer that is never called."""
    layer, largest = layer_of(host), _largest_rank(host)
    check_setting(rank <= largest, f"{field} at {name}", rank, f"at most {largest}")
    droppable = not (dropout and layer.weight_read_by_parent)
    check_setting(droppable, f"dropout at {name}", dropout, "0: its inputs are unseen")


def check_patterns(selected: Selected, patterns: Mapping[str, Iterable[str]]) -> None:
    """Raise a ``ValueError`` for a pattern, by the name of its setting, that matches nothing that was selected."""
    names = [target.name for target in selected.layers] + [target.weight_name for target in selected.experts]
    for field, globs in patterns.items():
        for glob in globs:
            matched = any(matches(name, glob) for name in names)
            check_setting(matched, field, glob, f"a glob of a target, like {names[0]}")


def select_low_rank(
    model: nn.Module,
    targets: Sequence[str],
    exclude: Sequence[str],
    rank_of: Callable[[str], int],
    experts: bool = False,
) -> Selected:
    """Return what targets select, without what ``all-linear`` alone means and a rank exceeds; a warning names that.

    Such layers are the gates of experts, for example.

    Args:
        model: Where to look.
        targets: Globs or roles, as for ``select``.
        exclude: Globs to leave out.
        rank_of: Returns the rank for the name of a layer, or of a weight of experts.
        experts: Whether weights of experts are adapted, too.
    """
    selected = (
        select_with_experts(model, targets, exclude) if experts else Selected(select(model, targets, exclude), [])
    )
    others = [target for target in targets if split_scope(target)[1] != "all-linear"]
    if len(others) == len(targets):
        return selected
    named = _ranks(select_with_experts(model, others)) if others else {}
    largest = _ranks(selected)
    narrow = {name for name, size in largest.items() if name not in named and size < rank_of(name)}
    if not narrow or len(narrow) == len(largest):
        return selected
    warnings.warn(
        f"all-linear leaves out {len(narrow)} layers with fewer inputs or outputs than the rank: "
        f"{described(sorted(narrow))}.",
        stacklevel=3,
    )
    return Selected(
        [target for target in selected.layers if target.name not in narrow],
        [target for target in selected.experts if target.weight_name not in narrow],
    )


def _ranks(selected: Selected) -> dict[str, int]:
    """Return the largest rank of each target by its name."""
    layers = {target.name: _largest_rank(target.host) for target in selected.layers}
    return layers | {target.weight_name: min(target.weight.shape(target.host)) for target in selected.experts}


def _largest_rank(host: Any) -> int:
    out, *rest = layer_of(host).shape(host)
    return min(out, math.prod(rest))
