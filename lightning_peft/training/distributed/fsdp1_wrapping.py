"""``flatten_inside``, ``check_flattens``: FSDP1 in the place of each unit of a sharding plan."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .sharding_plan import Units


def flatten_inside(model: nn.Module, units: Units, flatten: Callable[[nn.Module], nn.Module]) -> None:
    """Put ``flatten(unit)`` in the place of each unit of a plan; the children of the whole are left to its root."""
    for unit in _inside(units):
        parents = [
            (parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is unit
        ]
        flat = flatten(unit)
        for parent, key in parents:
            parent._modules[key] = flat


def check_flattens(model: nn.Module, units: Units) -> None:
    """Raise for units that FSDP1 cannot flatten."""
    replicated = {id(p) for p in units.replicated.values()}
    seen = set(replicated)
    for unit in [*_inside(units), model]:
        parameters = {n: p for n, p in unit.named_parameters() if id(p) not in seen}
        seen |= {id(p) for p in parameters.values()}
        kinds = {p.dtype for p in parameters.values()}
        wrong = [n for n, p in parameters.items() if not _flattens(p)]
        if len(kinds) > 1 or wrong:
            first = parameters[wrong[0]] if wrong else None
            reason = f"types {kinds}" if first is None else f"{wrong[0]} is of {first.dtype}, on {first.device}"
            raise TypeError(
                f"FSDP1 flattens each unit into one tensor of one floating type with values; in {type(unit).__name__}, "
                f"{reason}. Use FSDP2Strategy, or list modules of one type in wrap_modules."
            )


def _inside(units: Units) -> list[nn.Module]:
    """Return a plan's units but for the children of the whole, which FSDP1's root takes."""
    return [unit for name, unit in units.modules.items() if "." in name]


def _flattens(parameter: nn.Parameter) -> bool:
    plain = type(parameter.data) is Tensor and not parameter.is_meta
    return plain and parameter.is_floating_point() and parameter.dim() > 0
