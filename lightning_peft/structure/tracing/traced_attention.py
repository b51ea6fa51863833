"""``TracedAttention``: the layers that feed and read the attention calls of a trace, by the module that holds them."""

from __future__ import annotations

from collections.abc import Collection, Container

import torch
from torch import Tensor

from ..base_model import is_inside
from ..rows import Rows, periodic_rows
from ..structure import PART_OF_ROLE
from .attention_finder import AttentionCall
from .trace import Trace


class TracedAttention:
    """Projections of attention, found by what feeds its calls.

    Args:
        traced: Trace of a model.
        linear: Names of the layers that may be projections.
        blocks: Names of the blocks, inside of which they are, if there are any.
    """

    def __init__(self, traced: Trace, linear: Container[str], blocks: Collection[str]) -> None:
        self.modules = dict[str, int | None]()  # that hold projections of keys, with their number of heads
        self.features: dict[str, dict[str, Tensor]] = {role: {} for role in PART_OF_ROLE}
        self.outputs = list[str]()
        holders = [self._note_call(call, linear, blocks) for call in traced.attention]
        for output, projections in traced.linear_attention.items():
            self.outputs.append(output)
            for role, name in zip(PART_OF_ROLE, projections, strict=True):
                self._add(role, name, torch.ones(1, dtype=torch.bool))
        for name, sources in traced.reads.items():
            calls = [int(source[1:]) for source in sources if source.startswith("@")]
            within = [holder for number in calls if (holder := holders[number]) is not None]
            others = [source for source in sources if not source.startswith("@")]
            if name in linear and within and all(any(is_inside(o, holder) for holder in within) for o in others):
                self.outputs.append(name)

    def _note_call(self, call: AttentionCall, linear: Container[str], blocks: Collection[str]) -> str | None:
        """Note what feeds a call; return the module that holds its projections, None if it projects its output too."""
        feeding = {layer for part in PART_OF_ROLE.values() for layer in getattr(call, part) if layer in linear}
        holder = _holder(call.modules, feeding)
        if holder is None or (blocks and not any(is_inside(holder, block) for block in blocks)):
            return None  # what feeds it is not computed by projections of its own
        for role, part in PART_OF_ROLE.items():
            found = {n: f for n, f in getattr(call, part).items() if n in feeding and is_inside(n, holder)}
            if part == "key" and found:
                self.modules[holder] = call.heads
            for name, features in found.items():
                self._add(role, name, features)
        return None if holder in feeding else holder

    def _add(self, role: str, name: str, features: Tensor) -> None:
        known = self.features[role].get(name)
        self.features[role][name] = features if known is None else known | features

    def rows(self) -> dict[str, list[Rows] | str | None]:
        """Return the rows of query, key and value in layers of which a part is only some of the features."""
        layers = dict.fromkeys(name for features in self.features.values() for name in features)
        return {name: rows for name in layers if (rows := self._rows_in(name)) is not None}

    def _rows_in(self, name: str) -> list[Rows] | str | None:
        rows = list[Rows]()
        found = {PART_OF_ROLE[role]: features[name] for role, features in self.features.items() if name in features}
        if all(features.all() for features in found.values()):
            return None
        for part, features in found.items():
            ranges = ranges_of(features)
            if (of_part := periodic_rows(part, ranges, len(features))) is None:
                return f"the rows of its {part} do not repeat evenly: they are {_described(ranges)}"
            rows.append(of_part)
        return rows


def _holder(modules: tuple[str, ...], layers: set[str]) -> str | None:
    """Return the innermost of the modules that holds one of the layers."""
    return next((module for module in reversed(modules) if any(is_inside(layer, module) for layer in layers)), None)


def ranges_of(features: Tensor) -> list[tuple[int, int]]:
    """Return the ranges (first, after the last) in which a boolean vector is true."""
    edges = torch.diff(features.int(), prepend=torch.zeros(1).int(), append=torch.zeros(1).int())
    starts, stops = edges.eq(1).nonzero().flatten(), edges.eq(-1).nonzero().flatten()
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _described(ranges: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{start}:{stop}" for start, stop in ranges[:2])
    return f"{shown}..." if len(ranges) > 2 else shown
