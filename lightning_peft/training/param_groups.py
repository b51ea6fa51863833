"""``group_rule`` and ``patched_add_param_group``: groups of parameters by ``lr_factors`` and ``no_decay``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoints.adapter_state import strip_wrapper_names
from ..core.adapted_module import adapters
from ..structure.base_model import ADAPTERS_ATTRIBUTE, matches

Rule = Callable[[Tensor], dict[str, float]]  # the special settings of a parameter's group: lr_factor, weight_decay


def parameters_of(module: nn.Module, pattern: str) -> list[nn.Parameter]:
    """Return parameters by a glob of their names, or by the name of a method; a ``ValueError`` if there are none."""
    parameters = {strip_wrapper_names(name): p for name, p in module.named_parameters()}
    return _matching(pattern, parameters, _names_by_method(module))


def group_rule(module: nn.Module, lr_factors: dict[str, float], no_decay: Sequence[str]) -> Rule:
    """Return a function from a trainable parameter to the special settings of its group.

    Raises:
        ValueError: A pattern matches no trainable parameter.
    """
    parameters = {strip_wrapper_names(name): p for name, p in module.named_parameters() if p.requires_grad}
    by_method = _names_by_method(module)
    special: dict[int, dict[str, float]] = {}
    settings = [(p, "lr_factor", f) for p, f in lr_factors.items()] + [(p, "weight_decay", 0.0) for p in no_decay]
    for pattern, field, value in settings:
        for parameter in _matching(pattern, parameters, by_method):
            special.setdefault(id(parameter), {})[field] = value

    def rule(parameter: Tensor) -> dict[str, float]:
        return special.get(id(parameter), {})

    return rule


def _names_by_method(module: nn.Module) -> dict[str, list[str]]:
    """Return the ends of names of adapters' parameters, as they are and for all projections: lora_query.a, lora.a."""
    return {
        strip_wrapper_names(f"{host}.{ADAPTERS_ATTRIBUTE}.{key}.{name}".lstrip(".")): [
            f"{key}.{name}",
            f"{key.removesuffix(f'_{adapter.part}')}.{name}",
        ]
        for host, _, key, adapter in adapters(module)
        for name, _ in adapter.named_parameters()
    }


def _matching(pattern: str, parameters: dict[str, nn.Parameter], by_method: dict[str, list[str]]) -> list[nn.Parameter]:
    """Return parameters by a glob of their names or the name of their method."""
    matching = []
    for name, parameter in parameters.items():
        ends = by_method.get(name, [])
        names = [name, *(name.removesuffix(ends[0]) + end for end in ends)]
        if any(f"{end}.".startswith(f"{pattern}.") for end in ends) or any(matches(n, pattern) for n in names):
            matching.append(parameter)
    if not matching:
        raise ValueError(
            f"{pattern!r} is no trainable parameter or method. Parameters: {', '.join(list(parameters)[:10])}."
        )
    return matching


@contextmanager
def patched_add_param_group(rule: Rule) -> Iterator[None]:
    """Context in which new optimizers split their groups by a rule, so that schedulers see the final groups."""
    # A module builds optimizers of any class, and schedulers over them, in one call; groups cannot be split later. The
    # patch holds for the whole process: an optimizer that another thread builds meanwhile comes here as well, but the
    # rule knows nothing of its parameters and leaves its groups as they are. Two modules that build at once would nest
    # the patches in an order that may not be undone in reverse; Lightning builds one Trainer's at a time.
    original = Optimizer.add_param_group

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        for part in _split(param_group, rule):
            original(self, part)

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]


def apply_factors(optimizer: Optimizer) -> None:
    """Multiply each group's learning rate by its ``lr_factor`` during steps only.

    Schedulers and the learning-rate finder write one rate for all groups; the factor survives both.
    """
    optimizer.register_step_pre_hook(_scale)
    optimizer.register_step_post_hook(_unscale)


def _split(group: dict[str, Any], rule: Rule) -> list[dict[str, Any]]:
    parameters = group["params"]
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    parts: dict[tuple[tuple[str, float], ...], list[Any]] = {}
    for entry in parameters:
        special = rule(entry[1] if isinstance(entry, tuple) else entry)
        parts.setdefault(tuple(sorted(special.items())), []).append(entry)
    return [{**group, **dict(special), "params": chosen} for special, chosen in parts.items()] or [group]


def _scale(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if "lr_factor" in group:
            group["lr_before_factor"] = group["lr"]
            group["lr"] = group["lr"] * group["lr_factor"]


def _unscale(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if "lr_before_factor" in group:
            group["lr"] = group.pop("lr_before_factor")


def check_groups(optimizer: Optimizer, rule: Rule) -> None:
    """Raise if an optimizer holds a parameter in a group without the parameter's special settings."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if any(group.get(field) != value for field, value in rule(parameter).items()):
                raise ValueError(
                    "The optimizer was built before lr_factors and no_decay could group its parameters; build it "
                    "inside configure_optimizers (PEFTCLI does)."
                )
