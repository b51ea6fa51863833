"""``measured_structure``: the roles of a model's layers, its blocks and its output layers, from a trace."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from ..base_model import base_modules, base_parameters, is_inside, outwards
from ..layer_of import is_called_linear, layer_of
from ..structure import FeedForward, Structure
from .example_inputs import Inputs
from .trace import Trace, trace
from .traced_attention import TracedAttention
from .traced_blocks import traced_blocks, traced_output


def measured_structure(model: nn.Module, twin: nn.Module, inputs: Inputs) -> Structure:
    """Return the structure that one forward shows; raises what the forward raises.

    Args:
        model: The model.
        twin: Its hollow twin.
        inputs: Positional and named arguments of its forward.
    """
    modules = base_modules(model)
    linear = {name: module for name, module in modules.items() if is_called_linear(module)}
    traced = trace(twin, *inputs, linear=linear)
    of_torch = {name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    blocks = traced_blocks(model, traced)
    attention = TracedAttention(traced, linear.keys() | of_torch, blocks)
    outputs = attention.outputs + [f"{name}.out_proj" for name in attention.modules if name in of_torch]
    names: dict[str, Collection[str]] = {**attention.features, "attention.output": outputs}
    projections = {name for role in names.values() for name in role}
    feedforward = dict(_feedforward(traced, linear, blocks, projections))
    names |= {
        "feedforward.up": [up for found in feedforward.values() for up in found.ups],
        "feedforward.down": feedforward,
        "attention": attention.modules,
        "blocks": blocks,
        "output": traced_output(traced, blocks),
        "read": traced.read - of_torch,
        "zero_inputs": traced.zero,
        "unused": [name for name in base_parameters(model) if not _is_reached(name, traced.reached)],
    }
    order = {name: number for number, name in enumerate(["", *modules, *base_parameters(model)])}
    ordered = {key: sorted(found, key=order.__getitem__) for key, found in names.items()}
    ordered["called"] = [name for name in traced.order if name]
    return Structure(ordered, feedforward, dict.fromkeys(linear) | attention.rows(), attention.modules, measured=True)


def _feedforward(
    traced: Trace, linear: Mapping[str, nn.Module], blocks: Collection[str], projections: Collection[str]
) -> Iterator[tuple[str, FeedForward]]:
    """Yield feed-forward networks with their down-projection: inside blocks, back to the width that they read."""
    for down, found in traced.feedforward.items():
        members = [down, *found.ups]
        if any(name in projections for name in members) or not any(is_inside(down, block) for block in blocks):
            continue
        if any(traced.reads[up] & set(found.ups) for up in found.ups):
            continue
        width, hidden = layer_of(linear[down]).shape(linear[down])
        shapes = [tuple(layer_of(linear[up]).shape(linear[up])) for up in found.ups]
        # One layer may compute the gate and what it multiplies.
        if shapes in ([(hidden, width)], [(2 * hidden, width)], [(hidden, width)] * 2):
            yield down, found


def _is_reached(name: str, reached: Collection[str]) -> bool:
    """Return whether a parameter is reached, or a layer that it belongs to."""
    return any(owner in reached for owner in outwards(name))
