"""``structure_of``: the structure of a model, measured by a trace where its inputs are known, else by names."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .base_model import base_modules
from .fused_rows import set_measured_rows
from .known_families import KNOWN_FAMILIES
from .named_structure import named_structure
from .structure import LAYER_ROLES, Structure
from .tracing.example_inputs import Inputs, as_inputs, example_inputs, known_example, remember_example
from .tracing.hollow_twin import hollow_twin, twin_runs
from .tracing.measured_structure import measured_structure
from .transformers_api import from_config, outermost_pretrained

_cache = WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], Structure]]()


def structure_of(model: nn.Module) -> Structure:
    """Return the structure of a model, which is found once.

    A model with an ``example_input_array`` is traced, as one with inputs given to ``measure``. Else models of
    transformers inside are, by inputs made from their configuration, unless their family is in ``KNOWN_FAMILIES``. All
    else is found by names.
    """
    modules = base_modules(model)
    known = _cache.get(model)
    return known[1] if known is not None and known[0] == tuple(modules) else _remembered(model, _found(model), modules)


def measure(model: nn.Module, example_inputs: Any) -> None:
    """Trace a model with inputs of its forward: a tensor, a tuple by position or a dictionary by name.

    Raises:
        ValueError: The forward fails with these inputs.
    """
    example = as_inputs(example_inputs)
    _remembered(model, _traced(model, example), base_modules(model))
    remember_example(model, example)


def _remembered(model: nn.Module, structure: Structure, modules: dict[str, nn.Module]) -> Structure:
    for name, rows in structure.rows.items():
        set_measured_rows(modules[name], rows)
    _cache[model] = tuple(modules), structure
    return structure


def _found(model: nn.Module) -> Structure:
    if (example := known_example(model)) is not None:
        try:
            return _traced(model, example)
        except ValueError as error:
            warnings.warn(f"{error} Its layers are found without it.", stacklevel=2)
    parts = {name: _part(part).below(name) for name, part in outermost_pretrained(model)}
    if "" in parts:
        return parts[""]
    named = named_structure(model)
    return named.with_parts(parts, base_modules(model)) if parts else named


def _part(model: nn.Module) -> Structure:
    """Return the structure of a model of transformers."""
    named = named_structure(model)
    usual = all(named.names[role] for role in LAYER_ROLES)
    if usual and from_config(model, "model_type") in KNOWN_FAMILIES:
        return named
    try:
        return _traced(model)
    except ValueError as error:
        warnings.warn(f"{error} Its layers are found by their names.", stacklevel=2)
        return named


def _traced(model: nn.Module, example: Inputs | None = None) -> Structure:
    try:
        with twin_runs():
            twin = hollow_twin(model)
            return measured_structure(model, twin, example or example_inputs(twin))
    except Exception as error:  # whatever the code of a model raises with these inputs
        raise ValueError(
            f"{type(model).__name__} could not be traced ({type(error).__name__}: {error}). Give example_inputs to "
            f"lightning_peft.inject, or the module an example_input_array, that its forward takes."
        ) from error
