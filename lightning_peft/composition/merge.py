"""Folding adapters into the weights that they update."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.active_adapters import temporary_adapters
from ..core.adapted_module import adapters, set_active
from ..core.adapter import Adapter
from ..core.fingerprint import Merged, fingerprint, trained_or_replaced_names
from ..core.inject import detach
from ..core.injection_record import InjectionRecord, check_not_paused, get_record, require_record
from ..core.weight_backup import (
    allow_loading,
    changed_hosts,
    check_not_merged,
    forbid_loading,
    restore,
    run_with_backup,
)
from ..quantization.quantize import dequantize as dequantize_layers
from ..structure.base_model import count_owners
from ..structure.quantized import is_quantized


def merge(model: nn.Module, dequantize: bool = False, keep: bool = False) -> nn.Module:
    """Fold every adapter into its host and restore the original classes: all of them, or none if one cannot.

    With ``keep``, ``unmerge`` can undo it. Adapters then stay in the model and take no part, while the weights hold
    what they add. Sums of rounded numbers cannot be taken apart, so what is overwritten is kept, as far as its bits
    differ: rows, or columns. Meanwhile adapters cannot change, nothing is loaded, no fit starts; ``state_dict()`` and
    ``save_adapter`` give the base and the adapters as if they were not merged.

    Args:
        model: An adapted model; with ``keep``, the very module that was given to ``inject``.
        dequantize: Whether to give a quantized base its full type back first, with the rounding that adapters were
            trained on; how far that is from the weights before quantization is printed. To merge into those instead,
            load the adapter into the base that was not quantized.
        keep: Whether to keep what ``unmerge`` needs. Adapters that are not active may lie idle then.

    Returns:
        The model.

    Raises:
        TypeError: A method's adapters cannot be expressed by a weight, or an adapted weight is quantized.
        ValueError: A host shares a parameter with another module, an adapter lies idle, nothing was injected, or, with
            ``keep``, a parameter that trains would be overwritten.
        RuntimeError: Adapters are disabled, merged, or each row has its own.
    """
    check_not_paused(get_record(model) or InjectionRecord())
    check_not_merged(model)  # nor a part of it
    if keep:
        return _merge_and_keep(model, dequantize)
    found = mergeable(model)
    if name := _quantized(found):
        if not dequantize:
            raise TypeError(
                f"{name} is quantized, and rounding the result to as few bits would undo the training. Load "
                f"the adapter into the base before quantization and merge there, or pass dequantize=True."
            )
        error = dequantize_layers(model)
        print(f"Merging into dequantized weights; they differ from the original ones by {100 * error:.3g} % in norm.")
    _fold(found)
    return detach(model)


def unmerge(model: nn.Module) -> nn.Module:
    """Undo ``merge(model, keep=True)``: the base has its very bits again, and the adapters take part.

    Args:
        model: The very module that was merged, or a copy of it.

    Returns:
        The model.

    Raises:
        ValueError: Nothing was merged so.
        RuntimeError: The weights were changed since, or have another type; says which.
    """
    record = get_record(model)
    if record is None or record.merged is None:
        raise ValueError(
            f"There is nothing to unmerge in this {type(model).__name__}: only merge(model, keep=True) keeps what it "
            f"overwrites. After merging for good, build the base again and load the adapter."
        )
    for name, host, kept in changed_hosts(model):
        own = kept.tensors(host)
        if wrong := next((key for key, old in kept.slices.items() if own[key].dtype != old.values.dtype), None):
            raise RuntimeError(
                f"{name}.{wrong} was {kept.slices[wrong].values.dtype} when it was merged and is {own[wrong].dtype} "
                f"now, so that its bits cannot come back; give it that type again, or build the base again."
            )
    if fingerprint(model, record.merged.beside) != record.merged.now:
        raise RuntimeError(
            "The base's weights were written to since adapters were merged into them, and what was kept does not fit "
            "the new ones; build the base again and load the adapter."
        )
    _undo(model)
    allow_loading(model)
    record.set_merged(None)
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Context in which the active adapters are folded into their hosts; afterwards the base has its very bits again.

    For evaluation and generation at the speed of the base: ``merge(model, keep=True)``, then ``unmerge(model)``.

    Args:
        model: The very module that was given to ``inject``, not quantized.

    Raises:
        TypeError: A method's adapters cannot be expressed by a weight, or an adapted weight is quantized.
        ValueError: A host shares a parameter with another module, nothing was injected, or a parameter that trains
            would be overwritten.
        RuntimeError: Adapters are disabled, merged, or each row has its own; or weights were changed within.
    """
    merge(model, keep=True)
    try:
        yield
    finally:
        unmerge(model)


def _merge_and_keep(model: nn.Module, dequantize: bool) -> nn.Module:
    record, found = require_record(model), mergeable(model, idle=True)
    if dequantize or (name := _quantized(found)):
        what = "A weight that is dequantized" if dequantize else f"{name} is quantized and"
        raise TypeError(
            f"{what} would be rounded again, so that unmerge had nothing to go back to; "
            f"merge(model, dequantize=True) merges for good."
        )
    beside = trained_or_replaced_names(model, record.methods)
    base = fingerprint(model, beside)
    if base is None:
        raise ValueError("This model has no values yet (meta device); load its weights before merging.")
    try:
        for name, host in {id(host): (name, host) for name, host, *_ in found}.values():
            _change(name, host, [one for one in found if one[1] is host])
    except Exception:
        _undo(model)
        raise
    forbid_loading(model)
    record.set_merged(Merged(base, fingerprint(model, beside), beside))
    return model


def _change(name: str, host: Any, found: Sequence[tuple[str, Any, str, Adapter]]) -> None:
    order = tuple(key for key in host.peft_order if host.peft[key].persistent)
    kept = run_with_backup(host, functools.partial(_fold, found), order)
    set_active(host, temporary_adapters(host))
    for *_, adapter in found:
        adapter.invalidate_cache()
    if trained := [key for key, p in kept.tensors(host).items() if p.requires_grad]:
        raise ValueError(
            f"{name}.{trained[0]} trains in the base itself and would be overwritten, so that unmerge had two values "
            f"to go back to; merge(model) merges for good."
        )


def _undo(model: nn.Module) -> None:
    for _, host, _ in changed_hosts(model):
        set_active(host, restore(host).order + temporary_adapters(host))


def _quantized(found: Sequence[tuple[str, Any, str, Adapter]]) -> str | None:
    return next((name for name, host, *_ in found if is_quantized(host)), None)


def mergeable(model: nn.Module, idle: bool = False) -> list[tuple[str, Any, str, Adapter]]:
    """Return what ``adapters`` yields of those that take part, inner before outer, if all can be merged.

    Args:
        model: An adapted model.
        idle: Whether others may lie idle, which merging for good would lose.
    """
    found: list[tuple[str, Any, str, Adapter]] = list(adapters(model))
    if not found and get_record(model) is None:
        raise ValueError("There is nothing to merge: no method was injected into this model.")
    if away := next((key for _, host, key, _ in found if key not in host.peft_order and not idle), None):
        raise ValueError(f"{away!r} takes no part and would be lost; activate it, or take it out with remove_adapter.")
    found = [one for one in found if one[2] in one[1].peft_order]
    held = count_owners(model)
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
