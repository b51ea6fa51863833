"""Folders of HF PEFT, out."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..checkpoints.adapter_state import strip_wrapper_names
from ..checkpoints.metadata import adapter_metadata
from ..checkpoints.save_load import check_known_shards
from ..core.adapter import Adapter
from ..core.adapter_folder import WEIGHTS, replace_file
from ..core.injection_record import adapters_of, methods_in_same_group, require_record
from ..core.method import Method, to_dict
from ..ops.sharded_tensors import writes_files
from ..structure.transformers_api import from_config
from ..summary import BASE, row, summary
from . import modules_to_save as saved
from .model_card import CARD, Facts, card, check_own
from .module_names import network
from .peft_folder import write_folder
from .peft_format import Base, PeftFormat, State, check_supported
from .peft_formats import FORMATS

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    model_card: bool = True,
) -> Path:
    """Write an adapter and what trained beside it as HF PEFT does; nothing is written if it cannot be expressed.

    Args:
        model: The very module that was given to ``inject`` (with a Trainer: the LightningModule).
        folder: Where to write; names in it are those of the transformers model inside, if there is one.
        name: Name of the method, where the model has several with adapters.
        metrics: Results by name, for the model card.
        model_card: Whether to write a README.md that says what the adapter is.

    Returns:
        The folder.

    Raises:
        ValueError: Nothing was injected, or HF PEFT has nothing that computes the same; says what and why.
        FileExistsError: The folder has a README.md of somebody else.
        TypeError: A wrapper shards the model and does not say how; strategies of this package do.
    """
    folder, record = Path(folder), require_record(model)
    check_known_shards(model)
    if model_card:
        check_own(folder)
    method = _one(model, name)
    base, family = Base(model, *network(model)), _family(method)
    trained: State = {_within(base, strip_wrapper_names(key)): model.get_parameter(key) for key in record.trained}
    trained |= _own(base, _exported(model, method))
    config, state = _described(base, family, method, trained)
    if empty := [key for key, value in state.items() if value.is_meta]:
        raise ValueError(f"{empty[0]} has no values yet (meta device); load the model before its adapter is exported.")
    facts = _facts(base, method, metrics or {}) if model_card else None
    if writes_files():
        write_folder(folder, config, state)
        if facts is not None:
            text = card(facts, config, state, (folder / WEIGHTS).stat().st_size)
            replace_file(folder / CARD, text.encode())
    return folder


def _facts(base: Base, method: Method, metrics: Mapping[str, float]) -> Facts:
    """Return what a card says; of a sharded model, all processes have to ask."""
    counts = summary(base.model)
    kind = next(cls for cls in type(base.network).__mro__ if not issubclass(cls, FSDPModule))  # which renames classes
    methods = _exported(base.model, method)
    rows = [row(base.model, other) for other in methods] + [one for one in counts.rows if one[0] == BASE]
    labels = from_config(base.network, "num_labels")
    return Facts(
        method=to_dict(method),
        kind=(kind.__name__, kind.__module__.startswith("transformers.")),
        classes=labels if _task_of(base) in ("SEQ_CLS", "TOKEN_CLS") else None,
        base=adapter_metadata(base.model, only=methods)["base"],
        task=_task_of(base),
        rows=tuple(one for one in rows if one[2]),
        total=counts.total,
        metrics={key: _number(key, value) for key, value in metrics.items()},
    )


def _number(name: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # a tensor of one number is one, too
    except (TypeError, ValueError) as error:
        raise TypeError(f"metrics[{name!r}] must be a number, got {value!r}.") from error


def _family(method: Method) -> PeftFormat:
    family = next((f for f in FORMATS if f.method is type(method)), None)
    if family is None:
        shared = ", ".join(dict.fromkeys(f.method.__name__ for f in FORMATS))
        raise ValueError(f"HF PEFT has no {type(method).__name__}. Expressed are: {shared}.")
    return family


def _updates(model: nn.Module, method: Method) -> Iterator[Adapter]:
    """Yield the adapters of a method but those that take the place of the base's parameters."""
    return (adapter for adapter in adapters_of(model, method).values() if not adapter.replaces)


def _exported(model: nn.Module, method: Method) -> list[Method]:
    """Return a method, and those that have parameters of their own beside it."""
    others = methods_in_same_group(require_record(model), method)
    return [one for one in others if one is method or (adapters_of(model, one) and not any(_updates(model, one)))]


def _own(base: Base, methods: Sequence[Method]) -> State:
    """Return the tensors that adapters have of their own in place of the base's, by the names that these have."""
    found: dict[str, Any] = adapters_of(base.model, *methods)
    return {
        _within(base, f"{strip_wrapper_names(name)}.{key}"): value
        for name, adapter in found.items()
        if adapter.replaces
        for key, value in adapter.own.state_dict(keep_vars=True).items()
    }


def _described(base: Base, family: PeftFormat, method: Method, trained: State) -> tuple[dict[str, Any], State]:
    """Return the config and the tensors of a folder."""
    hosts, kind = _hosts(base, method), type(base.network).__name__
    settings, state = family.write(base, method, hosts)
    more, modules = saved.written(base, trained, hosts, "bias" in family.settings)
    alone = "modules_to_save" not in family.settings
    check_supported(alone and bool(more), f"Training {more} beside the adapter", f"{family.kind} has adapters alone")
    task = _task(base, family, more)
    check_supported(
        task is None and family.by_task, f"{type(method).__name__} on {kind}", "it is put in for known tasks alone"
    )
    modules |= saved.heads(base, task, modules)
    config = {
        "peft_type": family.kind,
        "task_type": task,
        "base_model_name_or_path": from_config(base.network, "name_or_path") or None,
        "inference_mode": True,
        **settings,
        **more,
    }
    return config, state | {family.prefix + key: value for key, value in modules.items()}


def _one(model: nn.Module, name: str | None) -> Method:
    record = require_record(model)
    found = {method.name: method for method in record.methods if any(_updates(model, method))}
    kinds = {key: f"{key} ({type(method).__name__})" for key, method in found.items()}
    if name is not None and name not in found:
        raise ValueError(f"No method with adapters is named {name!r}; there are: {', '.join(found) or 'none'}.")
    if name is None and len(found) != 1:
        known = ", ".join(kinds.values()) or "none with adapters"
        raise ValueError(f"A folder of HF PEFT holds the adapters of one method; the model has {known}. Give its name.")
    several = [kinds[key] for key in record.method_groups.get(name or "", ()) if key in found]
    if len(several) > 1:
        raise ValueError(f"A folder of HF PEFT holds one method's adapters; {name!r} stands for {', '.join(several)}.")
    return next(iter(found.values())) if name is None else found[name]


def _within(base: Base, name: str) -> str:
    if base.name and not name.startswith(f"{base.name}."):
        raise ValueError(f"{name} lies outside of {base.name}, the model that HF PEFT knows, and cannot be exported.")
    return name.removeprefix(f"{base.name}.") if base.name else name


def _hosts(base: Base, method: Method) -> dict[str, list[Any]]:
    hosts = defaultdict[str, list[Any]](list)
    for key, adapter in adapters_of(base.model, method).items():
        name = strip_wrapper_names(key.removesuffix(f".{adapter.part}") if adapter.part else key)
        hosts["" if name == base.name else _within(base, name)].append(adapter)
    return dict(hosts)


def _task(base: Base, family: PeftFormat, more: Mapping[str, Any]) -> str | None:
    """Return the task's name; for a classifier only where its head is in the file, since HF PEFT expects it there."""
    task = _task_of(base)
    optional = not family.by_task and "modules_to_save" not in more
    return None if optional and task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else task


def _task_of(base: Base) -> str | None:
    kind = type(base.network).__name__
    return next((task for end, task in _TASKS.items() if kind.endswith(end)), None)
