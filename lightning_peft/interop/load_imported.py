"""Values of another library's adapter, put into a model: all of them, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.inject import inject
from ..core.injection_record import adapters_of, get_record
from ..core.method import Method
from ..ops.sharded_tensors import assign
from ..structure.selection import literal
from .compatibility import checked
from .module_names import joined
from .peft_format import Base, State

Plan = Sequence[tuple[Method, Mapping[str, State]]]


def inject_and_load(base: Base, plan: Plan, values: State, source: str) -> None:
    """Inject methods and load what their adapters hold, and what base parameters have; checks all of it first.

    Args:
        base: Base model.
        plan: Methods with the packed state of each host, by whole name.
        values: Values of the network's parameters, which then train, and of its buffers.
        source: Where they come from, for messages.
    """
    states = [checked(base, method, given, source) for method, given in plan]
    known = dict(base.network.named_parameters())
    trained = [literal(joined(base.name, key)) for key in values if key in known]
    inject(base.model, [method for method, _ in plan], trained)
    for (method, _), by_host in zip(plan, states, strict=True):
        found = adapters_of(base.model, method)
        for name, state in by_host.items():
            own = found[name].state_dict(keep_vars=True)
            for key, value in state.items():
                assign(own[key], value)
    target = base.network.state_dict(keep_vars=True)
    for key, value in values.items():
        assign(target[key], value)
    if (record := get_record(base.model)) is not None:
        record.mark_trained()
