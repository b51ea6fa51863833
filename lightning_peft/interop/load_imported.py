"""``inject_and_load`` puts another library's adapter into a model: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.inject import inject
from ..core.injection_record import adapters_of, get_record
from ..core.method import Method
from ..core.nonfinite import warn_of_nonfinite
from ..ops.sharded_tensors import assign
from ..structure.selection import literal
from .compatibility import complete_states
from .module_names import join_names
from .peft_format import Base, StateDict

ImportPlan = Sequence[tuple[Method, Mapping[str, StateDict]]]


def inject_and_load(
    base: Base, plan: ImportPlan, values: StateDict, source: str, refusal: ValueError | None = None
) -> None:
    """Inject methods, then load the states of their adapters and the values of base parameters; check all of it first.

    Args:
        base: Base model.
        plan: Methods with the packed state of each host, by whole name.
        values: Values of the network's parameters, which then train, and of its buffers.
        source: Where they come from, for messages.
        refusal: What to raise where all fits, before anything changes.
    """
    states = [complete_states(base, method, imported, source) for method, imported in plan]
    if refusal is not None:
        raise refusal
    parameters = dict(base.network.named_parameters())
    trained = [literal(join_names(base.name, key)) for key in values if key in parameters]
    inject(base.model, [method for method, _ in plan], trained)
    for (method, _), by_host in zip(plan, states, strict=True):
        adapters = adapters_of(base.model, method)
        for name, state in by_host.items():
            adapter_tensors = adapters[name].state_dict(keep_vars=True)
            for key, value in state.items():
                assign(adapter_tensors[key], value)
    imported = {
        f"{name}.{key}": value for by_host in states for name, state in by_host.items() for key, value in state.items()
    }
    warn_of_nonfinite({**imported, **values}, source)
    target = base.network.state_dict(keep_vars=True)
    for key, value in values.items():
        assign(target[key], value)
    if (record := get_record(base.model)) is not None:
        record.mark_trained()
