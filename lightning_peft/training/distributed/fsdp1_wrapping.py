"""Which modules FSDP1 flattens, and what it cannot."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .sharding_plan import Units


def flatten_inside(model: nn.Module, units: Units, flatten: Callable[[nn.Module], nn.Module]) -> None:
    """Put ``flatten(unit)`` in the place of each unit of a plan; the children of the whole are left to its root."""
    for unit in _inside(units):
        places = [
            (parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is unit
        ]
        flat = flatten(unit)
        for parent, key in places:
            parent._modules[key] = flat


def check_flattens(model: nn.Module, units: Units) -> None:
    """Refuse what FSDP1 cannot lay out in a row."""
    replicated = {id(p) for p in units.replicated.values()}
    seen = set(replicated)
    for unit in [*_inside(units), model]:
        own = {n: p for n, p in unit.named_parameters() if id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        kinds = {p.dtype for p in own.values()}
        wrong = [n for n, p in own.items() if not _flattens(p)]
        if len(kinds) > 1 or wrong:
            what = f"{wrong[0]} is of {own[wrong[0]].dtype}, on {own[wrong[0]].device}" if wrong else f"types {kinds}"
            raise TypeError(
                f"FSDP1 flattens each unit into one tensor of one floating type with values; in {type(unit).__name__}, "
                f"{what}. Use FSDP2Strategy, or list modules of one type in wrap_modules."
            )


def _inside(units: Units) -> list[nn.Module]:
    """Return a plan's units but for the children of the whole, which FSDP1's root takes."""
    return [unit for name, unit in units.modules.items() if "." in name]


def _flattens(parameter: nn.Parameter) -> bool:
    plain = type(parameter.data) is Tensor and not parameter.is_meta
    return plain and parameter.is_floating_point() and parameter.dim() > 0
