"""``export_peft`` writes an adapter as a folder of HF PEFT."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..checkpoints.adapter_state import strip_wrapper_names
from ..checkpoints.companion_files import class_names_file, companion_files
from ..checkpoints.metadata import adapter_metadata
from ..checkpoints.save_load import check_known_shards
from ..core.adapter_folder import WEIGHTS, located
from ..core.injection_record import adapters_of, require_record
from ..core.method import Method, to_dict
from ..core.nonfinite import check_finite
from ..files.atomic_files import replace_files
from ..files.storage import Location
from ..ops.sharded_tensors import writes_files
from ..structure.base_model import stored_parameter
from ..structure.class_names import class_names
from ..structure.transformers_api import from_config
from ..summary import BASE, row, summary
from . import modules_to_save as saved
from . import trainable_tokens
from .export_selection import format_of, methods_to_export, select_method, token_methods
from .model_card import CARD, CardFacts, check_card_replaceable, render_card
from .module_names import find_network
from .peft_folder import peft_files
from .peft_format import Base, PeftFormat, StateDict, check_supported
from .task_types import task_of


def export_peft(
    model: nn.Module,
    folder: Location,
    name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    model_card: bool = True,
    allow_nonfinite: bool = False,
    tokenizer: Any = None,
) -> Path | str:
    """Write an adapter and what trained beside it as HF PEFT does; nothing is written if it cannot be expressed.

    A classifier's names of classes go into ``class_names.json`` and the model card. Files of an earlier export are
    replaced at once; by a checksum ``import_peft`` tells files of two exports apart.

    Args:
        model: The same module that was given to ``inject`` (with a Trainer: the LightningModule).
        folder: Where to write, a path or an address; names in it are those of the transformers model inside, if there
            is one; of several, of that which has all adapters.
        name: Name of the method, where the model has several with adapters.
        metrics: Results by name, for the model card.
        model_card: Whether to write a README.md that says what the adapter is.
        allow_nonfinite: Whether to write an adapter that holds NaN or infinity.
        tokenizer: Tokenizer or processor to write beside the adapter, as for ``save_adapter``.

    Returns:
        The folder.

    Raises:
        ValueError: Nothing was injected, the adapter holds NaN or infinity, or HF PEFT has nothing that computes the
            same; says what and why.
        FileExistsError: The folder has a README.md of somebody else.
        TypeError: A wrapper shards the model and does not say how; strategies of this package do.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), lp.LoRA(rank=2, targets=["0"]))
        >>> folder = lp.export_peft(model, "for-peft")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    record = require_record(model)
    check_known_shards(model)
    if model_card:
        check_card_replaceable(folder)
    method = select_method(model, name)
    base, peft_format = Base(model, *find_network(model, _adapted_names(model, method))), format_of(method)
    trained: StateDict = {
        _relative_name(base, strip_wrapper_names(key)): stored_parameter(model, key) for key in record.trained
    }
    trained |= _replacing_tensors(base, methods_to_export(model, method))
    config, state = _config_and_tensors(base, peft_format, method, trained)
    if empty := [key for key, value in state.items() if value.is_meta]:
        raise ValueError(f"{empty[0]} has no values yet (meta device); load the model before its adapter is exported.")
    if not allow_nonfinite:
        check_finite(state, "exported")
    facts = _card_facts(base, method, metrics or {}) if model_card else None
    if writes_files():
        files = peft_files(config, state)
        files = companion_files(model, tokenizer) | class_names_file(base.network) | files
        if facts is not None:
            files = {CARD: render_card(facts, config, state, len(files[WEIGHTS])).encode(), **files}
        replace_files(folder, files)
    return located(folder)


def _adapted_names(model: nn.Module, method: Method) -> list[str]:
    """Return the names of modules with adapters of what is exported, and of parameters that train beside them."""
    names = [name for exported in methods_to_export(model, method) for name in adapters_of(model, exported)]
    return [strip_wrapper_names(name) for name in [*names, *require_record(model).trained]]


def _card_facts(base: Base, method: Method, metrics: Mapping[str, float]) -> CardFacts:
    """Return what a card says; of a sharded model, all processes have to ask."""
    counts = summary(base.model)
    cls = next(cls for cls in type(base.network).__mro__ if not issubclass(cls, FSDPModule))  # which renames classes
    methods = methods_to_export(base.model, method)
    rows = [*(row(base.model, exported) for exported in methods), *(line for line in counts.rows if line[0] == BASE)]
    num_labels = from_config(base.network, "num_labels")
    return CardFacts(
        method=to_dict(method),
        kind=(cls.__name__, cls.__module__.startswith("transformers.")),
        class_names=class_names(base.network),
        classes=num_labels if task_of(base) in ("SEQ_CLS", "TOKEN_CLS") else None,
        base=adapter_metadata(base.model, only=methods)["base"],
        task=task_of(base),
        rows=tuple(line for line in rows if line[2]),
        total=counts.total,
        metrics={key: _as_float(key, value) for key, value in metrics.items()},
    )


def _as_float(name: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # a tensor of one number is one, too
    except (TypeError, ValueError) as error:
        raise TypeError(f"metrics[{name!r}] must be a number, got {value!r}.") from error


def _replacing_tensors(base: Base, methods: Sequence[Method]) -> StateDict:
    """Return the tensors that adapters hold in place of base parameters, by the names of these parameters."""
    adapters: dict[str, Any] = adapters_of(base.model, *methods)
    return {
        _relative_name(base, f"{strip_wrapper_names(name)}.{key}"): value
        for name, adapter in adapters.items()
        if adapter.replaces
        for key, value in adapter.own.state_dict(keep_vars=True).items()
    }


def _config_and_tensors(
    base: Base, peft_format: PeftFormat, method: Method, trained: StateDict
) -> tuple[dict[str, Any], StateDict]:
    """Return the config and the tensors of a folder."""
    hosts, model_class = _adapters_by_host(base, method), type(base.network).__name__
    check_supported(
        peft_format.by_task and task_of(base) is None,
        f"{type(method).__name__} on {model_class}",
        "it is put in for known tasks alone",
    )
    settings, state = peft_format.to_peft(base, method, hosts)
    with_rows = {
        k: v for tokens in token_methods(base.model, method) for k, v in _adapters_by_host(base, tokens).items()
    }
    token_settings, rows = trainable_tokens.beside(base, with_rows, peft_format.prefix)
    settings, state = settings | token_settings, state | rows
    trained_settings, modules = saved.trained_settings(base, trained, hosts, "bias" in peft_format.settings)
    alone = "modules_to_save" not in peft_format.settings
    check_supported(
        alone and bool(trained_settings),
        f"Training {trained_settings} beside the adapter",
        f"{peft_format.kind} has adapters alone",
    )
    task = _task(base, peft_format, trained_settings)
    modules |= saved.head_tensors(base, task, modules)
    config = {
        "peft_type": peft_format.kind,
        "task_type": task,
        "base_model_name_or_path": from_config(base.network, "name_or_path") or None,
        "inference_mode": True,
        **settings,
        **trained_settings,
    }
    return config, state | {peft_format.prefix + key: value for key, value in modules.items()}


def _relative_name(base: Base, name: str) -> str:
    if base.name and not name.startswith(f"{base.name}."):
        raise ValueError(f"{name} lies outside of {base.name}, the model that HF PEFT knows, and cannot be exported.")
    return name.removeprefix(f"{base.name}.") if base.name else name


def _adapters_by_host(base: Base, method: Method) -> dict[str, list[Any]]:
    hosts = defaultdict[str, list[Any]](list)
    for key, adapter in adapters_of(base.model, method).items():
        name = strip_wrapper_names(key.removesuffix(f".{adapter.part}") if adapter.part else key)
        hosts["" if name == base.name else _relative_name(base, name)].append(adapter)
    return dict(hosts)


def _task(base: Base, peft_format: PeftFormat, trained_settings: Mapping[str, Any]) -> str | None:
    """Return the task's name; for a classifier only where its head is in the file, since HF PEFT expects it there."""
    task = task_of(base)
    optional = not peft_format.by_task and "modules_to_save" not in trained_settings
    return None if optional and task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else task
