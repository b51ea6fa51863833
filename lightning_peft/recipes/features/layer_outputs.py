"""Captures the output of one layer of a frozen model; layers after it do not run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...structure.roles import blocks
from ...structure.selection import select_modules


class _Captured(Exception):
    """Ends a forward whose result is known."""


def layer_name(model: nn.Module, layer: int | str) -> str:
    """Return the name of a layer, given as the number of a block (-1 is the last) or as a glob.

    Raises:
        ValueError: There is no such block, or the glob matches nothing or several modules; names what there is.
    """
    if isinstance(layer, str):
        names = list(select_modules(model, [layer]))
        if len(names) > 1:
            raise ValueError(f"layer={layer!r} matches {len(names)} modules: {', '.join(names[:5])}. Name one of them.")
        return names[0]
    names = list(blocks(model))
    if not -len(names) <= layer < len(names):
        numbers = f"a number from {-len(names)} to {len(names) - 1}, or " if names else ""
        raise ValueError(
            f"layer={layer} is none of the {len(names)} blocks of this {type(model).__name__}. Give {numbers}a glob of "
            "a module's name."
        )
    return names[layer]


def captured(model: nn.Module, name: str, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Tensor:
    """Return what a layer returns, of a tuple or an output of transformers the first part; stop the forward there.

    Args:
        model: In evaluation mode.
        name: The layer's.
        inputs: What the model is called with, by name or by position.
    """
    outputs: list[Any] = []

    def end(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise _Captured

    handle = model.get_submodule(name).register_forward_hook(end)
    try:
        _call(model, inputs)
    except _Captured:
        pass
    finally:
        handle.remove()
    if not outputs:
        raise ValueError(f"The forward of {type(model).__name__} never calls {name}; give another layer.")
    return _tensor(outputs[0], name)


def run_before(model: nn.Module, name: str, inputs: Mapping[str, Any] | tuple[Any, ...]) -> set[nn.Module]:
    """Return the modules that a whole forward calls up to the end of a layer's call.

    Raises:
        ValueError: The layer is called more than once, as one that blocks share: the first call would not be the last.
    """
    layer, calls, seen = model.get_submodule(name), list[int](), set[nn.Module]()

    def enter(module: nn.Module, args: Any) -> None:
        if not calls:
            seen.add(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(1)

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles.append(layer.register_forward_hook(leave))
    try:
        _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) > 1:
        raise ValueError(f"{name} is called {len(calls)} times in one forward; give a layer that is called once.")
    return seen


def _call(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> None:
    parameter = next(model.parameters(), torch.empty(0))

    def fit(x: Tensor) -> Tensor:
        return x.to(
            parameter.device, parameter.dtype if x.is_floating_point() and parameter.is_floating_point() else None
        )

    inputs = tree_map_only(Tensor, fit, inputs)
    if isinstance(inputs, tuple):
        model(*inputs)
        return
    # A tokenizer may return more than an architecture reads, such as token types.
    named = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    model(**{key: value for key, value in inputs.items() if not named or key in named})


def _tensor(output: Any, name: str) -> Tensor:
    while isinstance(output, (tuple, list, Mapping)) and output:
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(output, Tensor):
        raise ValueError(f"{name} returns {type(output).__name__}, no tensor; give another layer.")
    return output.to_padded_tensor(0.0) if output.is_nested else output
