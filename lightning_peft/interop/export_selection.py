"""``select_method`` chooses the method to export, ``format_of`` its format in HF PEFT."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..core.adapter import Adapter
from ..core.injection_record import adapters_of, require_record
from ..core.method import Method
from ..core.method_groups import methods_in_same_group
from ..methods import TrainableTokens
from .peft_format import PeftFormat
from .peft_formats import FORMATS


def select_method(model: nn.Module, name: str | None) -> Method:
    """Return the method of this name; without a name, the only one that has adapters."""
    record = require_record(model)
    candidates = {method.name: method for method in record.methods if any(_updating_adapters(model, method))}
    beside = {tokens.name for method in candidates.values() for tokens in token_methods(model, method)}
    if name is None:
        candidates = {key: method for key, method in candidates.items() if key not in beside}
    descriptions = {key: f"{key} ({type(method).__name__})" for key, method in candidates.items()}
    if name is not None and name not in candidates:
        raise ValueError(f"No method with adapters is named {name!r}; there are: {', '.join(candidates) or 'none'}.")
    if name is None and len(candidates) != 1:
        choices = ", ".join(descriptions.values()) or "none with adapters"
        raise ValueError(
            f"A folder of HF PEFT holds the adapters of one method; the model has {choices}. Give its name."
        )
    several = [
        descriptions[key] for key in record.method_groups.get(name or "", ()) if key in candidates.keys() - beside
    ]
    if len(several) > 1:
        raise ValueError(f"A folder of HF PEFT holds one method's adapters; {name!r} stands for {', '.join(several)}.")
    return next(iter(candidates.values())) if name is None else candidates[name]


def token_methods(model: nn.Module, method: Method) -> list[TrainableTokens]:
    """Return the methods whose rows of tokens are in one folder with the adapters of this method."""
    if not any(f.method is type(method) and f.holds_tokens for f in FORMATS):
        return []
    group = methods_in_same_group(require_record(model), method)
    return [member for member in group if isinstance(member, TrainableTokens)]


def format_of(method: Method) -> PeftFormat:
    """Return how HF PEFT writes the adapters of a method."""
    peft_format = next((f for f in FORMATS if f.method is type(method)), None)
    if peft_format is None:
        shared = ", ".join(dict.fromkeys(f.method.__name__ for f in FORMATS))
        raise ValueError(f"HF PEFT has no {type(method).__name__}. Expressed are: {shared}.")
    return peft_format


def _updating_adapters(model: nn.Module, method: Method) -> Iterator[Adapter]:
    """Yield the adapters of a method, except those that replace parameters of the base."""
    return (adapter for adapter in adapters_of(model, method).values() if not adapter.replaces)


def methods_to_export(model: nn.Module, method: Method) -> list[Method]:
    """Return a method and those of its group that one folder holds beside it: trained copies, and rows of tokens."""
    group, tokens = methods_in_same_group(require_record(model), method), token_methods(model, method)
    return [
        member
        for member in group
        if member is method
        or member in tokens
        or (adapters_of(model, member) and not any(_updating_adapters(model, member)))
    ]
