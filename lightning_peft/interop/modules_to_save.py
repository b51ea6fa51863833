"""Trained parameters of the base model in HF PEFT's files: whole modules (``modules_to_save``) and biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.adapter_state import strip_wrapper_names
from ..ops.sharded_tensors import full_tensor
from ..structure.base_model import adapter_host, base_parameters, count_owners
from .module_names import join_names
from .peft_format import Base, StateDict, check_supported
from .renamed_modules import name_in

_WRAPPED = "base_layer."  # peft inserts this into the keys of an adapted module's base parameters
TIED = "ensure_weight_tying"  # setting: modules that share a parameter share its copy; the file has it for each
_SAVED, _UNUSED = "modules_to_save.", "original_module."  # peft's copies in a saved module: trained, untrained

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def trained_settings(
    base: Base, trained: StateDict, hosts: Collection[str], biases: bool
) -> tuple[dict[str, Any], StateDict]:
    """Return the settings and tensors that say which parameters of the network train.

    Args:
        base: Base model.
        trained: Trained parameters by name, within the network.
        hosts: Names of adapted modules.
        biases: Whether the format can say that biases train.
    """
    settings, state = dict[str, Any](), dict[str, Tensor]()
    all_biases = {strip_wrapper_names(name) for name in base_parameters(base.network) if "bias" in name}
    choices = {"lora_only": {f"{host}.bias" for host in hosts} & all_biases, "all": all_biases}
    rest = set(trained)
    for choice, names in choices.items():
        if biases and names and rest == names:  # those alone; a head that trains as well is saved whole
            settings["bias"] = choice
            state = {_peft_key(name, hosts): full_tensor(trained[name]) for name in names}
            rest = set()
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in trained if name in rest))
    for module in modules:
        _check_whole(base, module, {name: trained[name] for name in rest}, hosts, modules)
        module_state = _state(base, module)
        state |= {key: full_tensor(trained.get(key, value)) for key, value in module_state.items()}
    return settings | ({"modules_to_save": modules} if modules else {}), state


def head_tensors(base: Base, task: str | None, modules: StateDict) -> StateDict:
    """Return the tensors of the heads that HF PEFT expects for a task, besides those that train."""
    names = [name for name, _ in base.network.named_children() if name in _HEADS.get(task or "", ())]
    tensors = {key: value for name in names for key, value in _state(base, name).items()}
    return {key: full_tensor(value) for key, value in tensors.items() if key not in modules}


def _state(base: Base, module: str) -> StateDict:
    """Return the tensors of a module of the base, by their names within the network."""
    saved = base.network.get_submodule(module)
    host_of = adapter_host(saved)
    state = saved.state_dict(keep_vars=True)
    return {f"{module}.{key}": value for key, value in state.items() if host_of(key) is None}


def _peft_key(name: str, hosts: Collection[str]) -> str:
    owner, _, key = name.rpartition(".")
    return f"{owner}.{_WRAPPED}{key}" if owner in hosts else name


def _check_whole(base: Base, module: str, trained: StateDict, hosts: Collection[str], modules: Collection[str]) -> None:
    parameters = base_parameters(base.network.get_submodule(module))
    frozen = [name for name in parameters if join_names(module, name) not in trained]
    check_supported(
        bool(frozen), f"Training {module}", f"{', '.join(frozen[:3])} in it is frozen, and it saves whole modules"
    )
    owners = count_owners(base.network)  # of an adapter's copy, the adapters that hold it
    tied = [name for name in parameters if owners[id(trained[join_names(module, name)])] > 1]
    check_supported(bool(tied), f"Training {module}", f"another module shares {', '.join(tied)}")
    check_supported(
        module in hosts, f"Training {module} itself beside its adapter", "a module is adapted, or saved whole"
    )
    names = (strip_wrapper_names(name) for name, _ in base.network.named_modules())
    namesakes = [name for name in names if name.endswith(module) and name not in modules]
    check_supported(
        bool(namesakes), f"Training {module} alone", f"it saves all modules of this ending, {namesakes[:1]} too"
    )


def read_trained(base: Base, config: Mapping[str, Any], other_tensors: StateDict) -> StateDict:
    """Return values of parameters and buffers of the network by name, from the tensors that no adapter took.

    Raises:
        ValueError: A tensor has no place or another shape, a saved module lacks one, or the base is another one.
    """
    network_state = base.network.state_dict(keep_vars=True)
    used = {key: value for key, value in other_tensors.items() if _UNUSED not in key}
    place = name_in(base, network_state)
    state = {place(key.replace(_WRAPPED, "").replace(_SAVED, "")): value for key, value in used.items()}
    if unknown := sorted(state.keys() - network_state.keys()):
        raise ValueError(f"The file has {unknown[:5]}, for which {type(base.network).__name__} has no place.")
    suffixes = config.get("modules_to_save") or []
    modules = [n for n, _ in base.network.named_modules() if any(n.endswith(suffix) for suffix in suffixes)]
    declared = {key for key in network_state if any(key.startswith(f"{module}.") for module in modules)}
    if config.get(TIED):
        shared = {id(network_state[key]) for key in declared}
        declared |= {key for key, value in network_state.items() if id(value) in shared and key in state}
    if missing := sorted(declared - state.keys()):
        raise ValueError(f"The file saves {suffixes}, but lacks {missing[:5]}.")
    if config.get("bias") in ("all", "lora_only"):
        declared |= {key for key in state if "bias" in key}
    for key, value in state.items():
        if value.shape != network_state[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)} in the file, {tuple(network_state[key].shape)} in the model."
            )
        if key not in declared and not torch.equal(value.to(network_state[key]), network_state[key]):
            raise ValueError(f"The file brings another {key}, which none of its settings says to train: another base.")
    return {key: value for key, value in state.items() if key in declared}


def read_all_trained(base: Base, other_tensors: StateDict) -> StateDict:
    """Return values by name where every tensor beside the adapters' is one that trained."""
    settings = {
        "modules_to_save": sorted({key.rpartition(".")[0] for key in other_tensors if not key.endswith("bias")})
    }
    return read_trained(base, {**settings, "bias": "all"}, other_tensors)
