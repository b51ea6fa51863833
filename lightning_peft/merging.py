"""Folding adapters into the weights that they update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .base import owners
from .hosts import adapters
from .inject import Injection, detach, injected, injection, refuse_paused
from .quantization import dequantize as dequantize_layers
from .quantized_layers import is_quantized
from .switching import paused


def merge(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """Fold every adapter into its host and restore the original classes: all of them, or none if one cannot.

    Args:
        model: An adapted model.
        dequantize: Whether to give a quantized base its full type back first, with the rounding that adapters were
            trained on; how far that is from the weights before quantization is printed. To merge into those instead,
            load the adapter into the base that was not quantized.

    Returns:
        The model.

    Raises:
        TypeError: A method's adapters cannot be expressed by a weight, or an adapted weight is quantized.
        ValueError: A host shares a parameter with another module, an adapter lies idle, or nothing was injected.
    """
    refuse_paused(injection(model) or Injection())
    found = mergeable(model)
    if any(is_quantized(host) for _, host, _, _ in found):
        if not dequantize:
            name = next(name for name, host, *_ in found if is_quantized(host))
            raise TypeError(
                f"{name} is quantized, and rounding the result to as few bits would undo the training. Load "
                f"the adapter into the base before quantization and merge there, or pass dequantize=True."
            )
        error = dequantize_layers(model)
        print(f"Merging into dequantized weights; they differ from the original ones by {100 * error:.3g} % in norm.")
    _fold(found)
    return detach(model)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Context in which the active adapters are folded into their hosts; afterwards the base has its very bits again.

    For evaluation and generation at the speed of the base. What is merged cannot be taken out of rounded numbers, so
    the original parameters of all hosts are kept: it costs a copy of them for that time. Nothing trains within.

    Args:
        model: An adapted model, not quantized.

    Raises:
        TypeError: A method's adapters cannot be expressed by a weight, or an adapted weight is quantized.
        ValueError: A host shares a parameter with another module, or no adapter is there.
        RuntimeError: Adapters are disabled, merged, or each row has its own.
    """
    refuse_paused(injected(model))
    found = mergeable(model, idle=True)
    if odd := next((name for name, host, *_ in found if is_quantized(host)), None):
        raise TypeError(
            f"{odd} is quantized and would be rounded again; merge(model, dequantize=True) merges for good."
        )
    kept = [(host, dict(host._parameters)) for host in {id(host): host for _, host, *_ in found}.values()]
    values = [{k: p.detach().clone() for k, p in own.items() if p is not None} for _, own in kept]
    try:
        _fold(found)
        with paused(model):
            yield
    finally:
        with torch.no_grad():
            for (host, own), before in zip(kept, values, strict=True):
                host._parameters.update(own)
                for name, value in before.items():
                    own[name].copy_(value)


def mergeable(model: nn.Module, idle: bool = False) -> list[tuple[str, Any, str, Adapter]]:
    """Return what ``adapters`` yields of those that take part, inner before outer, if all can be merged.

    Args:
        model: An adapted model.
        idle: Whether others may lie idle, which merging for good would lose.
    """
    found: list[tuple[str, Any, str, Adapter]] = list(adapters(model))
    if not found and injection(model) is None:
        raise ValueError("There is nothing to merge: no method was injected into this model.")
    if away := next((key for _, host, key, _ in found if key not in host.peft_order and not idle), None):
        raise ValueError(f"{away!r} takes no part and would be lost; activate it, or take it out with remove_adapter.")
    found = [one for one in found if one[2] in one[1].peft_order]
    held = owners(model)
    for name, host, key, adapter in found:
        if type(adapter).merge is Adapter.merge:
            raise TypeError(f"{key!r} at {name} cannot be merged: {adapter.unmergeable}.")
        if any(held[id(p)] > 1 for p in host._parameters.values() if p is not None):
            raise ValueError(f"{name} shares a parameter with another module; untie it before merging.")
    return sorted(found, key=lambda one: (not one[3].replaces, one[1].peft_order.index(one[2])))


@torch.no_grad()
def _fold(found: Sequence[tuple[str, Any, str, Adapter]]) -> None:
    for _, host, _, adapter in found:
        adapter.merge(host)
