"""Adapters as folders of HF PEFT, out and in: all of it, or a refusal that names what does not fit."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..inject import adapters_of, inject, injected, injection
from ..method import Method
from ..shards import assign, writes_files
from . import saved
from .checks import checked, require_hosts
from .families import FAMILIES
from .family import Base, Family, File, State, refuse
from .folder import read_folder, write_folder
from .names import joined, network

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def export_peft(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write an adapter and what trained beside it as HF PEFT does; nothing is written if it cannot be expressed.

    Args:
        model: The very module that was given to ``inject`` (with a Trainer: the LightningModule).
        folder: Where to write; names in it are those of the transformers model inside, if there is one.
        name: Name of the method, where the model has several with adapters.

    Returns:
        The folder.

    Raises:
        ValueError: Nothing was injected, or HF PEFT has nothing that computes the same; says what and why.
    """
    record = injected(model)
    found = {method.name: method for method in record.methods if adapters_of(model, method)}
    method = _one(found, name)
    family = next((f for f in FAMILIES if f.method is type(method)), None)
    if family is None:
        shared = ", ".join(dict.fromkeys(f.method.__name__ for f in FAMILIES))
        raise ValueError(f"HF PEFT has no {type(method).__name__}. Expressed are: {shared}.")
    base = Base(model, *network(model))
    hosts = _hosts(base, method)
    settings, state = family.write(base, method, hosts)
    trained = [_within(base, parameter) for parameter in record.trained]
    more, modules = saved.written(base, trained, hosts, "bias" in family.settings)
    alone = "modules_to_save" not in family.settings
    refuse(alone and bool(more), f"Training {more} beside the adapter", f"{family.kind} has adapters alone")
    task = _task(base, family, more)
    kind = type(base.network).__name__
    refuse(task is None and family.by_task, f"{type(method).__name__} on {kind}", "it is put in for known tasks alone")
    modules |= saved.heads(base, task, modules)
    config = {
        "peft_type": family.kind,
        "task_type": task,
        "base_model_name_or_path": getattr(getattr(base.network, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
        **settings,
        **more,
    }
    state |= {family.prefix + key: value for key, value in modules.items()}
    return write_folder(folder, config, state) if writes_files() else Path(folder)


def import_peft(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> nn.Module:
    """Inject the adapter of a HF PEFT folder and load its values; the model is unchanged if anything is wrong.

    Args:
        model: The base model, or a module that holds it.
        folder: What ``save_pretrained`` of HF PEFT wrote; safetensors, or an old ``.bin`` of tensors alone.
        name: Name for the method; by default the name that our method has.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The folder is no adapter.
        ValueError: A file is damaged, does not fit this model, or asks for what no method here computes.
    """
    config, tensors = read_folder(folder)
    family = next((f for f in FAMILIES if f.kind == config["peft_type"]), None)
    if family is None:
        known = ", ".join(f.kind for f in FAMILIES)
        raise ValueError(f"{folder} is a {config['peft_type']} adapter, which is not read. Read are: {known}.")
    if unknown := family.unknown(config):
        raise ValueError(f"{folder} sets {unknown}, which may change what it computes and is not known here.")
    base = Base(model, *network(model))
    hosts, rest = _parted(family, tensors)
    require_hosts(base, family, File(config, hosts))
    values = saved.read(base, config, rest)
    plan = list(family.read(base, File(config, hosts), name or family.name))
    states = [checked(base, method, given, str(folder)) for method, given in plan]
    parameters = [joined(base.name, key) for key in values if key in dict(base.network.named_parameters())]
    inject(model, [method for method, _ in plan], globs_of_parameters(parameters))
    _fill(base, plan, states, values)
    return model


def globs_of_parameters(names: Sequence[str]) -> list[str]:
    """Return ``also_train`` for parameters by whole name, none of which is a role."""
    return [f"[{name[0]}]{name[1:]}" for name in names]


def _one(found: Mapping[str, Method], name: str | None) -> Method:
    if name is not None and name not in found:
        raise ValueError(f"No method with adapters is named {name!r}; there are: {', '.join(found) or 'none'}.")
    if name is None and len(found) != 1:
        kinds = ", ".join(f"{key} ({type(method).__name__})" for key, method in found.items()) or "none with adapters"
        raise ValueError(f"A folder of HF PEFT holds the adapters of one method; the model has {kinds}. Give its name.")
    return found[name] if name is not None else next(iter(found.values()))


def _within(base: Base, name: str) -> str:
    if base.name and not name.startswith(f"{base.name}."):
        raise ValueError(f"{name} lies outside of {base.name}, the model that HF PEFT knows, and cannot be exported.")
    return name.removeprefix(f"{base.name}.") if base.name else name


def _hosts(base: Base, method: Method) -> dict[str, list[Any]]:
    hosts = defaultdict[str, list[Any]](list)
    for key, adapter in adapters_of(base.model, method).items():
        name = key.removesuffix(f".{adapter.part}") if adapter.part else key
        hosts["" if name == base.name else _within(base, name)].append(adapter)
    return dict(hosts)


def _task(base: Base, family: Family, more: Mapping[str, Any]) -> str | None:
    """Return the task's name; for a classifier only where its head is in the file, since HF PEFT expects it there."""
    kind = type(base.network).__name__
    task = next((task for end, task in _TASKS.items() if kind.endswith(end)), None)
    optional = not family.by_task and "modules_to_save" not in more
    return None if optional and task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else task


def _parted(family: Family, tensors: State) -> tuple[dict[str, State], State]:
    """Return the family's tensors by host, and the others."""
    hosts, rest = defaultdict[str, State](dict), State()
    for key, value in sorted(tensors.items()):
        name = key.removeprefix(family.prefix)
        end = next((end for end in family.tensors if f".{name}".endswith(f".{end}")), None)
        if end is None:
            rest[name] = value
        else:
            hosts[name.removesuffix(end).rstrip(".")][end] = value
    return dict(hosts), rest


def _fill(
    base: Base, plan: Sequence[tuple[Method, Mapping[str, State]]], states: Sequence[Mapping[str, State]], values: State
) -> None:
    for (method, _), by_host in zip(plan, states, strict=True):
        found = adapters_of(base.model, method)
        for name, state in by_host.items():
            own = found[name].state_dict(keep_vars=True)
            for key, value in state.items():
                assign(own[key], value)
    target = base.network.state_dict(keep_vars=True)
    for key, value in values.items():
        assign(target[key], value)
    if (record := injection(base.model)) is not None:
        record.fresh = False
