"""Parameters of the base model beside adapters: whole modules (``modules_to_save``) and biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.adapter_state import strip_wrapper_names
from ..ops.sharded_tensors import full_tensor
from ..structure.base_model import ADAPTERS_ATTRIBUTE, base_parameters, count_owners
from .module_names import joined
from .peft_format import Base, State, check_supported

_WRAPPED = "base_layer."  # within a host's keys: what was there before
_SAVED, _UNUSED = "modules_to_save.", "original_module."  # so are a saved module's biases written where all train

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def written(base: Base, trained: State, hosts: Collection[str], biases: bool) -> tuple[dict[str, Any], State]:
    """Return the settings and tensors that say which parameters of the network train.

    Args:
        base: Base model.
        trained: Trained parameters by name, within the network.
        hosts: Names of adapted modules.
        biases: Whether the family can say that biases train.
    """
    settings, state = dict[str, Any](), dict[str, Tensor]()
    every = {strip_wrapper_names(name) for name in base_parameters(base.network) if "bias" in name}
    choices = {"lora_only": {f"{host}.bias" for host in hosts} & every, "all": every}
    rest = set(trained)
    for choice, names in choices.items():
        if biases and names and rest == names:  # those alone; a head that trains as well is saved whole
            settings["bias"] = choice
            state = {_inside(name, hosts): full_tensor(trained[name]) for name in names}
            rest = set()
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in trained if name in rest))
    for module in modules:
        _check_whole(base, module, rest, hosts, modules)
        own = _state(base, module)
        state |= {key: full_tensor(trained.get(key, value)) for key, value in own.items()}
    return settings | ({"modules_to_save": modules} if modules else {}), state


def heads(base: Base, task: str | None, modules: State) -> State:
    """Return the tensors of the heads that HF PEFT expects for a task, besides those that train."""
    names = [name for name, _ in base.network.named_children() if name in _HEADS.get(task or "", ())]
    every = {key: value for name in names for key, value in _state(base, name).items()}
    return {key: full_tensor(value) for key, value in every.items() if key not in modules}


def _state(base: Base, module: str) -> State:
    """Return the tensors of a module of the base, by their names within the network."""
    state = base.network.get_submodule(module).state_dict(keep_vars=True)
    return {f"{module}.{key}": value for key, value in state.items() if f".{ADAPTERS_ATTRIBUTE}." not in f".{key}"}


def _inside(name: str, hosts: Collection[str]) -> str:
    owner, _, key = name.rpartition(".")
    return f"{owner}.{_WRAPPED}{key}" if owner in hosts else name


def _check_whole(
    base: Base, module: str, trained: Collection[str], hosts: Collection[str], modules: Collection[str]
) -> None:
    inside = base_parameters(base.network.get_submodule(module))
    frozen = [name for name in inside if joined(module, name) not in trained]
    check_supported(
        bool(frozen), f"Training {module}", f"{', '.join(frozen[:3])} in it is frozen, and it saves whole modules"
    )
    held = count_owners(base.network)
    tied = [name for name, parameter in inside.items() if held[id(parameter)] > 1]
    check_supported(bool(tied), f"Training {module}", f"another module shares {', '.join(tied)}")
    check_supported(
        module in hosts, f"Training {module} itself beside its adapter", "a module is adapted, or saved whole"
    )
    known = (strip_wrapper_names(name) for name, _ in base.network.named_modules())
    others = [name for name in known if name.endswith(module) and name not in modules]
    check_supported(bool(others), f"Training {module} alone", f"it saves all modules of this ending, {others[:1]} too")


def read(base: Base, config: Mapping[str, Any], rest: State) -> State:
    """Return values of parameters and buffers of the network by name, from the tensors that no adapter took.

    Raises:
        ValueError: A tensor has no place or another shape, a saved module lacks one, or the base is another one.
    """
    own = base.network.state_dict(keep_vars=True)
    used = {key: value for key, value in rest.items() if _UNUSED not in key}
    state = {key.replace(_WRAPPED, "").replace(_SAVED, ""): value for key, value in used.items()}
    if strange := sorted(state.keys() - own.keys()):
        raise ValueError(f"The file has {strange[:5]}, for which {type(base.network).__name__} has no place.")
    endings = config.get("modules_to_save") or []
    modules = [n for n, _ in base.network.named_modules() if any(n.endswith(end) for end in endings)]
    declared = {key for key in own if any(key.startswith(f"{module}.") for module in modules)}
    if missing := sorted(declared - state.keys()):
        raise ValueError(f"The file saves {endings}, but lacks {missing[:5]}.")
    if config.get("bias") in ("all", "lora_only"):
        declared |= {key for key in state if "bias" in key}
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model.")
        if key not in declared and not torch.equal(value.to(own[key]), own[key]):
            raise ValueError(f"The file brings another {key}, which none of its settings says to train: another base.")
    return {key: value for key, value in state.items() if key in declared}


def read_declared(base: Base, rest: State) -> State:
    """Return values by name where every tensor beside the adapters' is one that trained."""
    settings = {"modules_to_save": sorted({key.rpartition(".")[0] for key in rest if not key.endswith("bias")})}
    return read(base, {**settings, "bias": "all"}, rest)
