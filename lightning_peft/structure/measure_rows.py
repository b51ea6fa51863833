"""``measure_fused_rows``: which rows of fused layers are query, key and value, from a trace of the model's twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .example_inputs import example_inputs
from .fused_rows import Rows, is_fused, set_measured_rows, was_measured
from .trace import AttentionCall, trace
from .transformers_api import from_config, outermost_pretrained

# Families whose rows fused_rows.py computes from the shape of the weight; a test holds them to the trace.
_KNOWN = ("gpt2",)


def measure_fused_rows(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Measure the rows of fused layers below models of transformers, once for each layer; others are left as they are.

    A model whose twin does not run, or in which a layer feeds no attention, keeps the rows that its shape suggests.

    Args:
        model: The model.
        modules: Its base modules by name.
    """
    layers = {name: m for name, m in modules.items() if is_fused(name) and not was_measured(m)}
    for outer, part in outermost_pretrained(model) if layers else ():
        prefix = f"{outer}." if outer else ""
        inside = {name.removeprefix(prefix): m for name, m in layers.items() if name.startswith(prefix)}
        if inside and from_config(part, "model_type") not in _KNOWN:
            calls = _trace(part)
            for name, layer in inside.items():
                set_measured_rows(layer, None if calls is None else rows_in(calls, name))


def rows_in(calls: Sequence[AttentionCall], layer: str) -> list[Rows] | str | None:
    """Return the rows of query, key and value in a layer; a text that says why they are no ranges, None if it has none.

    Args:
        calls: Attention calls of the model.
        layer: Name of the layer in the model.
    """
    rows = list[Rows]()
    for part in ("query", "key", "value"):
        features = [getattr(call, part)[layer] for call in calls if layer in getattr(call, part)]
        if features:
            ranges = ranges_of(torch.stack(features).any(0))
            if len(ranges) > 1:
                return f"the rows of its {part} lie in {len(ranges)} separate ranges, as {_described(ranges)}"
            rows.append(Rows(part, *ranges[0]))
    return rows or None


def ranges_of(features: Tensor) -> list[tuple[int, int]]:
    """Return the ranges (first, after the last) in which a boolean vector is true."""
    edges = torch.diff(features.int(), prepend=torch.zeros(1).int(), append=torch.zeros(1).int())
    starts, stops = edges.eq(1).nonzero().flatten(), edges.eq(-1).nonzero().flatten()
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _described(ranges: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{start}:{stop}" for start, stop in ranges[:2])
    return f"{shown}..." if len(ranges) > 2 else shown


def _trace(model: nn.Module) -> list[AttentionCall] | None:
    try:
        inputs = example_inputs(model)
        return None if inputs is None else trace(model, *inputs)
    except Exception:  # whatever the code of a model raises without its own inputs
        return None
