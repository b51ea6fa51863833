"""``without_useless``: leaves layers out of a role in which an adapter would do nothing, or not what it should."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Container

from torch import nn

from .base_model import name_pattern
from .read_weights import read_weight_attribute
from .structure import Structure

_SHOWN = 4


def without_useless(model: nn.Module, structure: Structure, role: str, names: Collection[str]) -> list[str]:
    """Return the modules of a role without those that a trace found useless to adapt; a warning names these.

    They are layers whose weight is read outside of their calls, those without a call or an effect on an output, and
    those whose inputs are always zero. Of layers that repeat, as experts in a list do, one that matters
    keeps those that the example did not call.

    Args:
        model: The model.
        structure: Its structure.
        role: The role, for the warning.
        names: Names of modules that play the role.
    """
    unused = set(structure.names.get("unused", ()))
    zero, read = set(structure.names.get("zero_inputs", ())), set(structure.names.get("read", ()))
    read = {name for name in read.intersection(names) if not read_weight_attribute(type(model.get_submodule(name)))}
    useless, called = [name for name in names if _is_useless(model, name, unused)], set(structure.names["called"])
    repeated = {name_pattern(name) for name in set(names).difference(useless)}
    reasons = {
        "the weight is read outside of calls": sorted(read),
        "no output depends on the parameters": [n for n in useless if n in called or name_pattern(n) not in repeated],
        "the inputs are always zero": [name for name in names if name in zero],
    }
    for reason, left_out in reasons.items():
        if left_out:
            shown = ", ".join(left_out[:_SHOWN]) + (", ..." if len(left_out) > _SHOWN else "")
            warnings.warn(f"{role} leaves out {shown}: {reason}.", stacklevel=2)
    all_left_out = set(itertools.chain.from_iterable(reasons.values()))
    return [name for name in names if name not in all_left_out]


def _is_useless(model: nn.Module, name: str, unused: Container[str]) -> bool:
    """Return whether no output depends on the parameters of a module."""
    parameters = [f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters()]
    return bool(unused and parameters) and all(parameter in unused for parameter in parameters)
