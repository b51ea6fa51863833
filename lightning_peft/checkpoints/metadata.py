"""``adapter_metadata`` describes injected methods and their base, ``inject_from_metadata`` injects them again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..core.active_adapters import activate
from ..core.check_placed import check_placed
from ..core.fingerprint import digest, fingerprint, trained_or_replaced_names
from ..core.inject import add_inactive, inject
from ..core.injection_record import get_record, require_record
from ..core.method import Method, from_dict, to_dict
from ..core.weight_backup import check_not_merged
from ..structure.class_names import class_names
from .companion_files import CLASS_NAMES
from .setting_differences import check_also_train, setting_differences

FORMAT = 1
_MOST = 10_000  # methods, patterns or names in a description


def adapter_metadata(model: nn.Module, packed: bool = False, only: Sequence[Method] | None = None) -> dict[str, Any]:
    """Return the methods, settings and base fingerprint of a model as plain data; arguments as in ``adapter_state``."""
    record = require_record(model)
    check_placed(model)
    methods = record.methods if only is None else only
    description = {
        "format": FORMAT,
        "methods": [to_dict(method.finalized() if packed else method) for method in methods],
        "also_train": list(record.also_train) if only is None else [],
        "base": _base_of(model, methods),
    }
    if only is None and record.switched:
        description |= {"active": list(record.active), "groups": {k: list(v) for k, v in record.method_groups.items()}}
    return description


def with_class_names(description: dict[str, Any], model: nn.Module, whole: bool = True) -> dict[str, Any]:
    """Return a description with the names of a model's classes; of some adapters, the model's names may be others'."""
    names = class_names(model) if whole else None
    return description if names is None else {**description, CLASS_NAMES: names}


def inject_from_metadata(model: nn.Module, description: Mapping[str, Any], source: str, strict: bool = True) -> None:
    """Inject what ``adapter_metadata`` wrote, unless the same is injected already, and check the base.

    Raises:
        ValueError: The description is of another format or method, or (if strict) of another base.
        RuntimeError: Adapters are merged into the weights, which loaded values would not reach.
    """
    check_not_merged(model)
    check_format(description, source)
    record = get_record(model)
    if record is None:
        try:
            _inject(model, description)
        except TypeError as error:
            raise ValueError(f"{source} does not fit this model: {error}") from error
    elif differences := setting_differences(record.methods, description, source):
        finalized = [method.finalized() for method in record.methods]
        is_finalized = not setting_differences(finalized, description, source)
        raise ValueError(
            f"{source} was written with other settings than this model's: {'; '.join(differences)}. Give the method "
            f"the settings of the file, or, to have both side by side, call lightning_peft.add_adapter(model, folder, "
            f"name=...)."
            + " It holds no encoders for training; call lightning_peft.finalize(model) first."
            * is_finalized
        )
    else:
        check_also_train(model, record.also_train, description["also_train"], source)
    if strict:
        check_base(model, description, source, require_record(model).methods)


def _inject(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Inject the methods of a description, with the order, the groups and the active names that it says."""
    methods = [from_dict(data) for data in description["methods"]]
    groups = {name: list(names) for name, names in description.get("groups", {}).items()}
    active = description.get("active", [method.name for method in methods])
    group_of = {member: name for name, names in groups.items() for member in names}
    by_name = defaultdict[str, list[Method]](list)
    for method in methods:
        by_name[group_of.get(method.name, method.name)].append(method)
    # Groups may hold copies of parameters that train in the base as well, so that these are injected apart from them.
    injected = [name for name in active if name not in groups]
    if injected or description["also_train"]:
        inject(model, [method for name in injected for method in by_name[name]], description["also_train"])
    for name in by_name:
        if name not in injected:
            add_inactive(model, by_name[name])
    require_record(model).restore(methods, groups)  # injected group by group, but the file lists another order
    if active and (groups or set(active) != set(by_name)):
        activate(model, *active)


def check_format(description: Any, source: str) -> None:
    """Raise a ``ValueError`` if another version wrote the description, or it is none."""
    if not isinstance(description, Mapping):
        raise ValueError(
            f"{source} is damaged: its settings are a {type(description).__name__}. Copy or save it again."
        )
    if type(description.get("format")) is not int or description["format"] != FORMAT:
        raise ValueError(f"{source} has format {str(description.get('format'))[:50]}; this version reads {FORMAT}.")
    methods: Any = description.get("methods")
    also_train = description.get("also_train")
    groups, active = description.get("groups", {}), description.get("active", [])
    problems = {
        "methods with their names": not _are(dict, methods)
        or not _are(str, [data.get("name", "") for data in methods]),
        "patterns in also_train": not _are(str, also_train),
        "a fingerprint of its base": not isinstance(description.get("base"), str | None),
        "names in active": not _are(str, active),
        "names of classes": not _are(str, description.get(CLASS_NAMES, [])),
        "names by group": not isinstance(groups, dict) or not all(_are(str, v) for v in [[*groups], *groups.values()]),
    }
    if damaged := [expected for expected, wrong in problems.items() if wrong]:
        raise ValueError(f"{source} is damaged: its settings lack {' and '.join(damaged)}. Copy or save it again.")
    names = {*groups, *(data.get("name") for data in methods)}
    if unknown := [
        name for name in [*active, *(n for members in groups.values() for n in members)] if name not in names
    ]:
        raise ValueError(f"{source} is damaged: {unknown[0]!r} is active or in a group, and no method has this name.")


def _are(kind: type, values: Any) -> bool:
    """Whether a value is a list of values of one type, of a length that some model can have."""
    return isinstance(values, list) and len(values) <= _MOST and all(type(value) is kind for value in values)


def check_base(model: nn.Module, description: Mapping[str, Any], source: str, methods: Sequence[Method]) -> None:
    """Raise a ``ValueError`` if the description belongs to another base than that of these methods."""
    fingerprint_here = _base_of(model, methods)
    if None not in (fingerprint_here, description["base"]) and fingerprint_here != description["base"]:
        raise ValueError(
            f"{source} belongs to another base model: fingerprint {description['base']}, here {fingerprint_here}. Load "
            f"the weights that it was trained on. To try anyway, pass strict=False (to PEFTStrategy and "
            f"load_from_checkpoint check_base=False)."
        )


def _base_of(model: nn.Module, methods: Sequence[Method]) -> str | None:
    """Return the fingerprint of the base of these methods, without adapters that are merged into it."""
    record, left_out = get_record(model), trained_or_replaced_names(model, methods)
    if record is None or record.merged is None:
        return fingerprint(model, left_out)
    return digest(sampled for name, sampled in record.merged.base.items() if name not in left_out)
