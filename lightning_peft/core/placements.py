"""``Placement``: an adapter and its host; ``placements_of``: those of a method, checked against what it selected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from ..structure.layer_of import UnknownLayerError
from ..structure.pattern_errors import LISTING
from ..structure.recorded_selections import Selection, record_selections
from ..structure.selection import literal, names_of_shared, selected_targets
from .adapted_module import adapter_key, replaced_names
from .adapter import Adapter
from .check_updates import check_updates
from .checks import check_selection
from .method import Method
from .own_parameters import OwnParameters


class Placement(NamedTuple):
    """One adapter and its host.

    Args:
        name: Dotted name of the host.
        host: The module.
        key: Key of the adapter on its host.
        adapter: The adapter.
    """

    name: str
    host: nn.Module
    key: str
    adapter: Adapter


def placements_of(model: nn.Module, modules: dict[str, nn.Module], method: Method) -> list[Placement]:
    """Return the adapters of a method with their hosts; raise if they change more than the method selected."""
    selections: list[Selection]
    try:
        with record_selections() as selections:
            placed = list(method.adapters(model))
    except UnknownLayerError as error:
        raise TypeError(f"{error}{_which(error.host, model, modules, method)} {LISTING}") from error
    for name, adapter in placed:
        if name not in modules:
            raise ValueError(f"{type(method).__name__} has {type(adapter).__name__} on {name!r}, which is no module.")
    check_selection(selections, placed)
    check_updates((name, modules[name], adapter) for name, adapter in placed)
    return [Placement(name, modules[name], adapter_key(method.name, adapter), adapter) for name, adapter in placed]


def _which(host: nn.Module, model: nn.Module, modules: dict[str, nn.Module], method: Method) -> str:
    """Return a sentence with the name of a host and what selected it, where a field of the method did."""
    name = next((name for name, module in modules.items() if module is host), None)
    patterns = getattr(method, "targets", [])
    if name is None:
        return ""
    found = {pattern: selected_targets(model, [pattern]) for pattern in patterns}
    meant = [pattern for pattern, names in found.items() if name in names]
    selected = f", which {', '.join(map(repr, meant))} in targets selects" if meant else ""
    has_others = hasattr(method, "exclude") and any(len(found[pattern]) > 1 for pattern in meant)
    return f" It is the module {name!r}{selected}{f'; exclude=[{name!r}] leaves it out' if has_others else ''}."


def copies_of(
    model: nn.Module, modules: dict[str, nn.Module], name: str, trained: set[str]
) -> tuple[Method, list[Placement]]:
    """Return a method whose adapters hold copies of these parameters, and these adapters.

    Modules that share a parameter share its copy.
    """
    first_names = names_of_shared(model)
    method = own_parameters(name, [each for each, first in first_names.items() if first in trained])
    placements = placements_of(model, modules, method)
    if extra := {first_names[each] for each in replaced_names((p.name, p.adapter) for p in placements)} - trained:
        raise ValueError(
            f"{min(extra)} ends in the name of a parameter that trains and would train too; rename one of them."
        )
    return method, placements


def own_parameters(name: str, parameters: Iterable[str], untie: bool = False) -> Method:
    """Return a method whose adapters hold copies of parameters of these very names, beside a method of a name."""
    return OwnParameters(name=f"{name}_own", targets=[literal(each) for each in sorted(parameters)], untie=untie)
