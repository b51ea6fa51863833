"""``inject_and_load`` puts another library's adapter into a model: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..core.inject import inject, inject_group
from ..core.injection_record import adapters_of, get_record
from ..core.method import Method
from ..core.nonfinite import warn_of_nonfinite
from ..core.own_parameters import COPIES_ATTRIBUTE
from ..core.placements import own_parameters
from ..ops.sharded_tensors import assign
from ..structure.base_model import count_owners
from .compatibility import complete_states
from .module_names import join_names
from .peft_format import Base, StateDict

ImportPlan = Sequence[tuple[Method, Mapping[str, StateDict]]]


def inject_and_load(
    base: Base,
    plan: ImportPlan,
    values: StateDict,
    source: str,
    tied: bool = False,
    refusal: ValueError | None = None,
) -> None:
    """Inject methods and load the states of their adapters; check all of it first.

    Values of base parameters go into copies, which belong to the adapter: the base stays as it is.

    Args:
        base: Base model.
        plan: Methods with the packed state of each host, by whole name.
        values: Values of the network's parameters, which train as copies, and of the buffers beside them.
        source: Where they come from, for messages.
        tied: Whether modules that share a parameter share its copy.
        refusal: What to raise where all fits, before anything changes.
    """
    states = [complete_states(base, method, imported, source) for method, imported in plan]
    methods, copies = [method for method, _ in plan], _copies(base, plan, values, source, tied)
    if refusal is not None:
        raise refusal
    inject(base.model, methods) if copies is None else inject_group(base.model, [*methods, copies])
    for (method, _), by_host in zip(plan, states, strict=True):
        adapters = adapters_of(base.model, method)
        for name, state in by_host.items():
            adapter_tensors = adapters[name].state_dict(keep_vars=True)
            for key, value in state.items():
                assign(adapter_tensors[key], value)
    if copies is not None:
        owners = adapters_of(base.model, copies)
        for name, value in values.items():
            host, _, key = join_names(base.name, name).rpartition(".")
            if host in owners:
                assign(owners[host].get_submodule(COPIES_ATTRIBUTE).state_dict(keep_vars=True)[key], value)
    by_name = {f"{name}.{key}": value for state in states for name, s in state.items() for key, value in s.items()}
    warn_of_nonfinite({**by_name, **values}, source)
    if (record := get_record(base.model)) is not None:
        record.mark_trained()


def _copies(base: Base, plan: ImportPlan, values: StateDict, source: str, tied: bool) -> Method | None:
    """Return the method that holds copies of the parameters among these values; None where there are none."""
    parameters = dict(base.network.named_parameters(remove_duplicate=False))
    trained = {join_names(base.name, key): parameters[key] for key in values if key in parameters}
    hosts, stored = {name.rpartition(".")[0] for name in trained}, base.network.state_dict(keep_vars=True)
    for key in values.keys() - parameters.keys():
        if join_names(base.name, key).rpartition(".")[0] not in hosts and not torch.equal(values[key], stored[key]):
            raise ValueError(
                f"{source} has another {key}, a buffer of a module without parameters, of which no adapter has a copy."
            )
    owners = count_owners(base.model)
    untie = not tied and any(owners[id(parameter)] > 1 for parameter in trained.values())
    return own_parameters(plan[0][0].name, trained, untie) if trained else None
