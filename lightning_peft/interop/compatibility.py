"""Checks that a file fits a model, made before anything of it is loaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping

from torch import nn

from ..checkpoints.key_prefix import align_keys
from ..core.adapter import Adapter
from ..core.method import Method
from .peft_format import Base, PeftFile, PeftFormat, StateDict, check_supported

_PRUNED = ("lora_A", "lora_B", "lora_E")  # of AdaLoRA, which may have kept no rank of a layer
_MATRICES = ("lora_A", "lora_B", "lora_embedding", "hada_w", "lokr_w")  # beginnings of names of tensors


def check_hosts(base: Base, peft_format: PeftFormat, file: PeftFile) -> None:
    """Raise where a file and a model do not have the same hosts."""
    modules = dict(base.network.named_modules())
    for host in file.state:
        _check_not_in_attention(modules, host)
    check_module_names(base, file.state)
    if missing := [name for name in peft_format.expected(base, file) if name not in file.state]:
        raise ValueError(f"The file's settings adapt {missing[:5]}, but it has no tensors of them.")
    if not file.state:
        raise ValueError(
            f"The file has no tensor of a {peft_format.kind} adapter: none ends in {', '.join(peft_format.tensors)}."
        )


def check_tensors(states: Mapping[str, StateDict], source: str) -> None:
    """Raise where a tensor of an adapter cannot be one, whatever the model is."""
    for host, tensors in states.items():
        for name, value in tensors.items():
            dimensions = 2 if name.startswith(_MATRICES) else 1
            empty = not value.numel() and name not in _PRUNED
            if not value.is_floating_point() or empty or value.dim() < dimensions:
                raise ValueError(
                    f"{source} is damaged: {name} of {host} has shape {tuple(value.shape)} and type {value.dtype}; "
                    f"expected numbers with fractions, of rank 1 or more."
                )


def _check_not_in_attention(modules: Mapping[str, nn.Module], host: str) -> None:
    """Refuse an adapter on torch's attention or on its ``out_proj``."""
    owner = host.removesuffix(".out_proj").removesuffix(".base_layer")
    check_supported(
        isinstance(modules.get(owner), nn.MultiheadAttention),
        f"An adapter on torch's attention {owner}",
        "of its out_proj, it adds an update twice together with the attention, and none otherwise",
    )


def check_module_names(base: Base, hosts: Collection[str]) -> None:
    """Raise where a file adapts modules that a model has not."""
    modules = dict(base.network.named_modules())
    if unknown := [name for name in hosts if name not in modules]:
        raise ValueError(f"The file adapts {unknown[:3]}, which the model has not. {_advice(unknown, modules)}")


def _advice(unknown: Collection[str], modules: Mapping[str, object]) -> str:
    """Return which prefix differs, if that is all, else close names."""
    aligned = align_keys(unknown, modules)
    name, here = next(iter(aligned.items()), ("", ""))
    common = os.path.commonprefix([name[::-1], here[::-1]])[::-1]
    if len(aligned) == len(unknown) and common and all(new in modules for new in aligned.values()):
        theirs, ours = name.removesuffix(common), here.removesuffix(common)
        return (
            f"Only a prefix differs: {theirs!r} in the file is {ours!r} here. Give import_peft the module whose names "
            f"the file has, or rename its keys."
        )
    close = difflib.get_close_matches(next(iter(unknown)), modules, n=3) or list(modules)[-3:]
    return f"Close names: {', '.join(close)}."


def complete_states(base: Base, method: Method, imported: Mapping[str, StateDict], source: str) -> dict[str, StateDict]:
    """Return the states of a method's adapters by host, as ``import_state`` completes them; raise if unfit."""
    states = {}
    for host, adapter in method.adapters(base.model):
        name = f"{host}.{adapter.part}" if adapter.part else host
        if adapter.state_dict():
            states[name] = _complete_state(adapter, imported.get(name, {}), f"{source}: {name}")
    if surplus := imported.keys() - states.keys():
        raise ValueError(
            f"{source} has tensors of {sorted(surplus)[:5]}, where {type(method).__name__} has no adapter."
        )
    return states


def _complete_state(adapter: Adapter, imported: StateDict, where: str) -> StateDict:
    state, expected = adapter.import_state(imported), adapter.state_dict()
    if state.keys() != expected.keys():
        raise ValueError(
            f"{where} lacks {sorted(expected.keys() - state.keys())}, has too {sorted(state.keys() - expected.keys())}."
        )
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise ValueError(f"{where}: {key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}.")
    return state
