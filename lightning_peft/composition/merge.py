"""``merge`` folds adapters into the weights that they update, ``unmerge`` undoes it, ``merged`` does both in turn."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.active_adapters import temporary_adapters
from ..core.active_on_host import inactive
from ..core.adapted_module import set_active
from ..core.checks import check_not_paused
from ..core.fingerprint import Merged, fingerprint, samples_of
from ..core.inject import detach
from ..core.injection_record import InjectionRecord, get_record, require_record
from ..core.nonfinite import check_finite
from ..core.weight_backup import (
    allow_loading,
    changed_hosts,
    check_not_merged,
    forbid_loading,
    restore,
    run_with_backup,
)
from ..quantization.quantize import dequantize as dequantize_layers
from ..structure.quantized import is_quantized
from .mergeable_adapters import HostedAdapter, mergeable_adapters, rehearse_merge, tensors_of


def merge(model: nn.Module, dequantize: bool = False, keep: bool = False, allow_nonfinite: bool = False) -> nn.Module:
    """Fold every adapter into its host and restore the original classes: all of them, or none if one cannot.

    With ``keep``, ``unmerge`` can undo it. Adapters then stay in the model, inactive, while the weights hold what they
    add. Sums of rounded numbers cannot be taken apart, so what is overwritten is kept, as far as its bits differ: rows,
    or columns. Meanwhile adapters cannot change, nothing is loaded, no fit starts; ``state_dict()`` and
    ``save_adapter`` give the base and the adapters as if they were not merged.

    Args:
        model: An adapted model, which is returned; with ``keep``, the same module that was given to ``inject``.
        dequantize: Whether to give a quantized base its full type back first, with the rounding that adapters were
            trained on; how far that is from the weights before quantization is printed. To merge into those instead,
            load the adapter into the base that was not quantized.
        keep: Whether to keep what ``unmerge`` needs. There may be inactive adapters then.
        allow_nonfinite: Whether to merge adapters that hold NaN or infinity.

    Raises:
        TypeError: A method's adapters cannot be expressed by a weight, or an adapted weight is quantized.
        ValueError: A host shares a parameter with another module, an adapter is inactive or holds NaN or infinity,
            nothing was injected, or, with ``keep``, a parameter that trains would be overwritten.
        RuntimeError: Adapters are disabled, merged, or each row has its own.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8)), lp.LoRA(targets=["0"]))
        >>> list(lp.merge(model).state_dict())  # a plain model again
        ['0.weight', '0.bias']
    """
    check_not_paused(get_record(model) or InjectionRecord())
    check_not_merged(model)  # nor a part of it
    if keep:
        return _merge_and_keep(model, dequantize, allow_nonfinite)
    adapted = mergeable_adapters(model)
    if not allow_nonfinite:
        check_finite(tensors_of(adapted), "merged")
    rehearse_merge(adapted)
    if name := _first_quantized(adapted):
        if not dequantize:
            raise TypeError(
                f"{name} is quantized, and rounding the result to as few bits would undo the training. Load "
                f"the adapter into the base before quantization and merge there, or pass dequantize=True."
            )
        error = dequantize_layers(model)
        print(f"Merging into dequantized weights; they differ from the original ones by {100 * error:.3g} % in norm.")
    _merge_all(adapted)
    return detach(model)


def unmerge(model: nn.Module) -> nn.Module:
    """Undo ``merge(model, keep=True)``: the base has the same bits as before, and the adapters are active.

    Args:
        model: The same module that was merged, or a copy of it, which is returned.

    Raises:
        ValueError: Nothing was merged so.
        RuntimeError: The weights were changed since, or have another type; says which.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8)), lp.LoRA(init="orthogonal", targets=["0"]))
        >>> base = model[0].weight.clone()
        >>> torch.equal(lp.merge(model, keep=True)[0].weight, base), torch.equal(lp.unmerge(model)[0].weight, base)
        (False, True)
    """
    record = get_record(model)
    if record is None or record.merged is None:
        raise ValueError(
            f"There is nothing to unmerge in this {type(model).__name__}: only merge(model, keep=True) keeps what it "
            f"overwrites. After merging for good, build the base again and load the adapter."
        )
    for name, host, backup in changed_hosts(model):
        tensors = backup.tensors(host)
        for key, saved in backup.slices.items():
            if tensors[key].dtype != saved.values.dtype:
                raise RuntimeError(
                    f"{name}.{key} was {saved.values.dtype} when it was merged and is {tensors[key].dtype} now, so "
                    f"that its bits cannot come back; give it that type again, or build the base again."
                )
    if fingerprint(model) != record.merged.now:
        raise RuntimeError(
            "The base's weights were written to since adapters were merged into them, and what was kept does not fit "
            "the new ones; build the base again and load the adapter."
        )
    _restore_hosts(model)
    allow_loading(model)
    record.set_merged(None)
    return model


@contextmanager
def merged(model: nn.Module, allow_nonfinite: bool = False) -> Iterator[None]:
    """Context in which the active adapters are folded into their hosts; afterwards the base has the same bits again.

    For evaluation and generation at the speed of the base: ``merge(model, keep=True)``, then ``unmerge(model)``.

    Args:
        model: The same module that was given to ``inject``, not quantized.
        allow_nonfinite: Whether to merge adapters that hold NaN or infinity.

    Raises:
        RuntimeError: Weights were changed within. The other errors are those of ``merge`` and ``unmerge``.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8)), lp.LoRA(init="orthogonal", targets=["0"]))
        >>> base = model[0].weight.clone()
        >>> with lp.merged(model):
        ...     torch.equal(model[0].weight, base)
        False
    """
    merge(model, keep=True, allow_nonfinite=allow_nonfinite)
    try:
        yield
    finally:
        unmerge(model)


def _merge_and_keep(model: nn.Module, dequantize: bool, allow_nonfinite: bool) -> nn.Module:
    record, adapted = require_record(model), mergeable_adapters(model, allow_inactive=True)
    if dequantize or (name := _first_quantized(adapted)):
        subject = "A weight that is dequantized" if dequantize else f"{name} is quantized and"
        raise TypeError(
            f"{subject} would be rounded again, so that unmerge had nothing to go back to; "
            f"merge(model, dequantize=True) merges for good."
        )
    if not allow_nonfinite:
        check_finite(tensors_of(adapted), "merged")
    base = samples_of(model)
    if base is None:
        raise ValueError("This model has no values yet (meta device); load its weights before merging.")
    try:
        for name, host in {id(host): (name, host) for name, host, *_ in adapted}.values():
            _merge_host_and_keep(name, host, [entry for entry in adapted if entry[1] is host])
    except Exception:
        _restore_hosts(model)
        raise
    forbid_loading(model)
    record.set_merged(Merged(base, fingerprint(model)))
    return model


def _merge_host_and_keep(name: str, host: Any, adapted: Sequence[HostedAdapter]) -> None:
    order = tuple(key for key in host.peft_order if host.peft[key].persistent)  # what is active by default
    backup = run_with_backup(host, functools.partial(_merge_all, adapted), order)
    set_active(host, temporary_adapters(host))
    for *_, adapter in adapted:
        adapter.invalidate_cache()
    if trained := [key for key, p in backup.tensors(host).items() if p.requires_grad]:
        raise ValueError(
            f"{name}.{trained[0]} trains in the base itself and would be overwritten, so that unmerge had two values "
            f"to go back to; merge(model) merges for good."
        )


def _restore_hosts(model: nn.Module) -> None:
    for _, host, _ in changed_hosts(model):
        set_active(host, restore(host).order + temporary_adapters(host))


def _first_quantized(adapted: Sequence[HostedAdapter]) -> str | None:
    return next((name for name, host, *_ in adapted if is_quantized(host)), None)


@torch.no_grad()
def _merge_all(adapted: Sequence[HostedAdapter]) -> None:
    with inactive(host for _, host, *_ in adapted):  # else hosts would show the copies that replace parameters
        for _, host, _, adapter in adapted:
            adapter.merge(host)
