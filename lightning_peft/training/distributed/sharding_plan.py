"""``plan_units``: which modules are sharded, each as one unit that is gathered when it computes."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ...core.adapted_module import adapters
from ...structure.base_model import base_modules, matches
from ...structure.roles import blocks
from ...summary import size


@dataclass(frozen=True)
class Units:
    """A plan for sharding a model.

    Args:
        modules: Modules that are sharded, by name; a module inside of another comes before it.
        replicated: Parameters that every process holds whole.
        lines: The plan as text.
    """

    modules: dict[str, nn.Module]
    replicated: dict[str, nn.Parameter]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def plan_units(module: nn.Module, wrap_modules: Sequence[str] | None, processes: int) -> Units:
    """Plan without changing anything: the chosen modules, and around them the children of the whole.

    Beside adapters, all that trains is replicated: it is small, methods read it as it is, and files of it need no
    gathering. Without adapters, base parameters train as they are sharded.

    Args:
        module: The whole, which is no unit itself.
        wrap_modules: Class names, or globs on the end of dotted names; None takes the model's repeated blocks.
        processes: Over how many processes each unit is sharded.

    Raises:
        ValueError: A pattern matches nothing, or parameters of one unit would train in several types.
    """
    chosen = blocks(module) if wrap_modules is None else _chosen(module, wrap_modules)
    inside_out = dict(sorted(chosen.items(), key=lambda item: -item[0].count(".")))
    around = {n: m for n, m in module.named_children() if n not in chosen and any(True for _ in m.parameters())}
    units = inside_out | around
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    outside = dict(module.named_parameters(recurse=False))
    replicate = any(True for _ in adapters(module)) or any(p.requires_grad for p in outside.values())
    replicated = outside | (trained if replicate else {})
    sharded = _parameters_by_unit(units, {id(p) for p in replicated.values()})
    for name, parameters in sharded.items():
        if len(types := {p.dtype for p in parameters if p.requires_grad}) > 1:
            raise ValueError(f"Parameters of {name} train in several types ({types}); give them one, or list their "
                             f"modules in wrap_modules.")  # fmt: skip
    return Units(units, replicated, _lines(units, sharded, replicated, processes))


def _chosen(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    modules, chosen = base_modules(module), dict[str, nn.Module]()
    for pattern in patterns:
        matching = {n: m for n, m in modules.items() if type(m).__name__ == pattern or matches(n, pattern)}
        if not matching:
            kinds = {type(m).__name__ for m in modules.values() if any(True for _ in m.parameters())}
            close = difflib.get_close_matches(pattern, kinds, n=5) or sorted(kinds)
            raise ValueError(f"wrap_modules: {pattern!r} is no class or name of a module here. Classes: {close}.")
        chosen |= matching
    return chosen


def _parameters_by_unit(units: dict[str, nn.Module], without: set[int]) -> dict[str, list[nn.Parameter]]:
    """Return what each unit shards: parameters of no unit further inside."""
    seen, sharded = set(without), dict[str, list[nn.Parameter]]()
    for name, unit in units.items():
        sharded[name] = [p for p in unit.parameters() if id(p) not in seen]
        seen |= {id(p) for p in sharded[name]}
    return sharded


def _lines(
    units: dict[str, nn.Module],
    sharded: dict[str, list[nn.Parameter]],
    replicated: dict[str, nn.Parameter],
    processes: int,
) -> tuple[str, ...]:
    kinds = Counter((type(units[n]).__name__, _contents(parameters)) for n, parameters in sharded.items())
    lines = [f"{count} x {name}: {contents}" for (name, contents), count in kinds.items()]
    part = sum(p.nbytes for parameters in sharded.values() for p in parameters) // processes
    lines += [f"whole on each process: {_contents(list(replicated.values()))}"] if replicated else []
    return "sharded units", *lines, f"each of {processes} processes holds {size(part)} of the units"


def _contents(parameters: Sequence[nn.Parameter]) -> str:
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    types = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    return f"{sum(p.numel() for p in parameters):,} parameters ({types}), {trained:,} of them train"
