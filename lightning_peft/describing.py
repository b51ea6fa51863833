"""What was injected into which base, as plain data, and back again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .fingerprints import fingerprint
from .inject import inject, injected, injection, named
from .method import from_dict, to_dict
from .overwritten import refuse_merged

FORMAT = 1


def describe(model: nn.Module, packed: bool = False, only: str | None = None) -> dict[str, Any]:
    """Return what was injected into a model and into which base, as plain data; arguments as in ``adapter_state``."""
    record = injected(model)
    methods = record.methods if only is None else [named(record, only)]
    return {
        "format": FORMAT,
        "methods": [to_dict(method.finalized() if packed else method) for method in methods],
        "also_train": list(record.also_train) if only is None else [],
        "base": _base_of(model),
    }


def restore(model: nn.Module, description: Mapping[str, Any], source: str, strict: bool = True) -> None:
    """Inject what ``describe`` wrote, unless the same is injected already, and check the base.

    Raises:
        ValueError: The description is of another format or method, or (if strict) of another base.
        RuntimeError: Adapters are merged into the weights, which what is loaded would not reach.
    """
    refuse_merged(model)
    check_format(description, source)
    record = injection(model)
    if record is None:
        inject(model, [from_dict(data) for data in description["methods"]], description["also_train"])
    elif [to_dict(method) for method in record.methods] != description["methods"]:
        names = ", ".join(str(data.get("method")) for data in description["methods"])
        final = [to_dict(method.finalized()) for method in record.methods] == description["methods"]
        raise ValueError(
            f"{source} was written with {names} in other settings than this model's: {record.methods}."
            + " It holds no encoders for training; call lightning_peft.finalize(model) first." * final
        )
    if strict:
        check_base(model, description, source)


def check_format(description: Mapping[str, Any], source: str) -> None:
    """Raise a ``ValueError`` for what another version wrote."""
    if description.get("format") != FORMAT:
        raise ValueError(f"{source} has format {description.get('format')!r}; this version reads {FORMAT}.")


def check_base(model: nn.Module, description: Mapping[str, Any], source: str) -> None:
    """Raise a ``ValueError`` for what belongs to another base."""
    found = _base_of(model)
    if None not in (found, description["base"]) and found != description["base"]:
        raise ValueError(
            f"{source} belongs to another base model: fingerprint {description['base']}, here {found}. Load "
            f"the weights that it was trained on, or pass strict=False (PEFTStrategy: check_base=False) to try anyway."
        )


def _base_of(model: nn.Module) -> str | None:
    """Return the fingerprint of the base as it is without adapters."""
    record = injection(model)
    return fingerprint(model) if record is None or record.merged is None else record.merged.base
