"""``check_shared_host`` and ``check_trains_once``: which adapters, and parameters of the base, go together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from torch import nn

from .adapted_module import adapters, method_name, replaced_names
from .adapter import Adapter
from .injection_record import InjectionRecord
from .weight_update import WeightUpdate


def check_shared_host(placed: Sequence[tuple[str, Adapter]]) -> None:
    """Raise where an adapter that rewrites rows of a weight as a whole would share them, or two replace a parameter."""
    updates, replaced = defaultdict[str, list[Adapter]](list), set[str]()
    for name, adapter in placed:
        for key in adapter.replaces:
            if f"{name}.{key}" in replaced:
                raise ValueError(f"Two adapters replace {name}.{key}; only one of them can be active at a time.")
            replaced.add(f"{name}.{key}")
        if isinstance(adapter, WeightUpdate) or adapter.exclusive or "weight" in adapter.replaces:
            updates[name].append(adapter)
    for number, (name, adapter) in enumerate(placed):
        if not adapter.exclusive:
            continue
        on_same_host = [a for a in updates[name] if a is not adapter]
        on_same_rows = [a for a in on_same_host if "" in (a.part, adapter.part) or a.part == adapter.part]
        if on_same_rows:
            raise ValueError(
                f"{type(adapter).__name__} at {name} rewrites the whole weight and cannot share it with "
                f"{type(on_same_rows[0]).__name__}; give the methods different targets."
            )
        _check_innermost(name, adapter, [inner for host, inner in placed[:number] if host == name])


def check_trains_once(
    model: nn.Module, record: InjectionRecord, trained: Collection[str], placed: Sequence[tuple[str, Adapter]]
) -> None:
    """Raise where a parameter of the base would train below a copy of it, which takes its place in calls.

    Args:
        model: The model, before the injection.
        record: Its record.
        trained: Names of parameters that shall train.
        placed: Adapters to add, with the names of their hosts.
    """
    groups = {name for names in record.method_groups.values() for name in names}
    copied = replaced_names((n, a) for n, _, key, a in adapters(model) if method_name(key, a) not in groups)
    if twice := (copied & set(trained)) | (replaced_names(placed) & set(record.trained)):
        raise ValueError(
            f"{min(twice)} would train in the base, below an adapter's copy of it that takes its place: choose one of "
            f"both, or add the copy with add_adapter, under a name of its own."
        )


def _check_innermost(name: str, adapter: Adapter, inside: Sequence[Adapter]) -> None:
    """Raise where an adapter that computes its update from the weight lies outside of one that changes the weight.

    Its update would be that of the base's weight in calls, and that of the changed weight once both are merged.
    """
    for inner in inside:
        bias_alone = inner.merges_bias_alone and not getattr(adapter, "updates_bias", False)
        merges = type(inner).merge is not Adapter.merge and not (bias_alone or inner.replaces)
        if merges and not isinstance(inner, WeightUpdate) and _share_rows(inner, adapter):
            raise ValueError(
                f"{type(adapter).__name__} at {name} computes its update from the base's weight, and "
                f"{type(inner).__name__} inside of it changes that weight: name the method of {type(adapter).__name__} "
                f"first, as in inject(model, [LoRA(decompose=True), IA3()])."
            )


def _share_rows(one: Adapter, other: Adapter) -> bool:
    """Return whether two adapters change common rows of a weight."""
    if one.rows is None or other.rows is None:
        return True
    return not set(one.rows.numbers()).isdisjoint(other.rows.numbers())
