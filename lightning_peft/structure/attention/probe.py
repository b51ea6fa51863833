"""``probe_attention``: what the attention modules of a model call, measured on its hollow twin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..tracing.example_inputs import example_inputs, known_example
from ..tracing.hollow_twin import hollow_twin, twin_runs
from ..transformers_api import outermost_pretrained
from .calls import AttentionCalls

Widths = tuple[int, int]  # of keys and of values, all their heads together


def probe_attention(model: nn.Module, names: Iterable[str]) -> dict[str, Widths | None]:
    """Return the widths of keys and values in the attention call of each module; None where it calls none.

    Left out are modules that are not called in a forward with example inputs, or whose model does not run with them.
    """
    found: dict[str, Widths | None] = {}
    wanted = set(names)
    for outer, part in _parts(model):
        prefix = f"{outer}." if outer else ""
        inside = {name: name.removeprefix(prefix) for name in wanted - set(found) if name.startswith(prefix)}
        if inside:
            found |= _probe(part, inside)
    return found


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the models that example inputs can be made for."""
    if known_example(model) is not None:
        yield "", model
    yield from outermost_pretrained(model)


def _probe(model: nn.Module, names: dict[str, str]) -> dict[str, Widths | None]:
    """Return what ``probe_attention`` does, for modules whose names in the model are the values."""
    found: dict[str, Widths | None] = {}
    try:
        with twin_runs(), torch.no_grad():
            twin = hollow_twin(model)
            inputs = known_example(model) or example_inputs(twin)
            for name, inside in names.items():
                module: Any = twin.get_submodule(inside)
                module.forward = partial(_watched, module, module.forward, found, name)
            twin(*inputs[0], **inputs[1])
    except Exception:  # whatever the code of a model raises with these inputs
        return found
    return found


def _watched(
    module: nn.Module,
    forward: Callable[..., Any],
    found: dict[str, Widths | None],
    name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    def change(attend: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Any:
        found[name] = (key.shape[1] * key.shape[-1], value.shape[1] * value.shape[-1])
        return attend(query, key, value, *rest, **settings)

    calls = AttentionCalls(change, module)
    with calls:
        output = forward(*args, **kwargs)
    found.setdefault(name, None)
    return output
