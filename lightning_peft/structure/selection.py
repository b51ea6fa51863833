"""``select``: from globs on dotted names, and roles, to modules and parameters. A pattern without a match raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from .base_model import base_modules, base_parameters, matches
from .expert_layers import expert_modules, expert_weights, owners_of_experts, warn_of_experts
from .fused_rows import has_parts, requested_rows
from .pattern_errors import LISTING, listed, no_match
from .recorded_selections import Selection, recorded_selections
from .roles import ROLES, called_like_role
from .rows import Rows
from .structure_of import structure_of
from .towers import in_scope, split_scope
from .useless_layers import without_useless


class Target(NamedTuple):
    """Host for one adapter.

    Attributes:
        name: Dotted name of the host.
        host: The module.
        rows: Rows of the host's weight that the targets mean; None for its whole output.

    Examples:
        >>> from lightning_peft.core import select
        >>> select(nn.Sequential(nn.Linear(4, 2)), ["0"])[0]
        Target(name='0', host=Linear(in_features=4, out_features=2, bias=True), rows=None)
    """

    name: str
    host: nn.Module
    rows: Rows | None


def modules_of_role(model: nn.Module, role: str) -> list[str]:
    """Return the names of the modules that play a role, without those in which nothing would be learned."""
    return without_useless(model, structure_of(model), role, list(ROLES[role](model)))


def select(model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = ()) -> list[Target]:
    """Return where adapters go, in the model's order: (name, host, rows).

    A layer that computes query, key and value at once is returned once for each part that a role asks for, with the
    rows of that part. Give the rows to ``WeightUpdate``; an adapter that changes others is refused by ``inject``.

    Args:
        model: Where to look.
        targets: Globs on the end of dotted names, or roles; see ``ROLES``. After a scope and a colon they mean what is
            inside of modules that a glob matches, or of a tower: ``decoder:*.fc1``, ``vision:all-linear``.
        exclude: Globs of modules to leave out.

    Raises:
        ValueError: A target or an exclusion matches nothing; names what the model has.

    Examples:
        >>> from lightning_peft.core import select
        >>> [name for name, host, rows in select(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["0"])]
        ['0']
    """
    meant_by = selected_targets(model, targets, exclude)
    if any(split_scope(target)[1] == "all-linear" for target in targets):
        warn_of_experts(model)
    return layer_targets(model, meant_by)


def layer_targets(model: nn.Module, meant_by: Mapping[str, Sequence[str]]) -> list[Target]:
    """Return the targets in modules, given with what means each: each once, or once for each part that a role means."""
    modules = base_modules(model)
    return [
        Target(name, modules[name], rows)
        for name, meant in meant_by.items()
        for rows in requested_rows(name, modules[name], meant, ROLES)
    ]


def select_modules(model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return modules by name, in the model's order, for adapters that act on whole modules.

    Arguments and errors are those of ``select``.

    Examples:
        >>> from lightning_peft.core import select_modules
        >>> select_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"])
        {'1': ReLU()}
    """
    modules = base_modules(model)
    return {name: modules[name] for name in selected_targets(model, targets, exclude)}


def selected_targets(
    model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = (), experts: bool = False
) -> dict[str, list[str]]:
    """Return the names of selected modules, in the model's order, with the targets, without scopes, that mean each.

    With ``experts``, ``all-linear`` means modules that hold experts, too, and an exclusion may mean weights of them.
    """
    modules = base_modules(model)
    measured = structure_of(model).measured  # which also measures the rows of fused layers
    meant_by: dict[str, list[str]] = {}
    for target in listed(targets, "targets"):
        for name in _named(model, target, list(modules), experts) or no_match(target, modules, measured):
            meant_by.setdefault(name, []).append(split_scope(target)[1])
    for pattern in listed(exclude, "exclude", empty=True):
        scope, end = split_scope(pattern)
        of_experts = owners_of_experts(model, end)
        matching = in_scope(model, scope, [name for name in modules if matches(name, end)])  # never a role
        for name in matching or of_experts or no_match(pattern, modules):
            if not (experts and name in of_experts):
                meant_by.pop(name, None)
    if not meant_by:
        raise ValueError(f"exclude={list(exclude)!r} leaves nothing of targets={list(targets)!r}. {LISTING}")
    chosen = {name: meant_by[name] for name in modules if name in meant_by}
    if (selections := recorded_selections.get()) is not None:
        parts = [n for n in chosen if has_parts(n, modules[n]) or (expert_weights(modules[n]) and not experts)]
        selections += [Selection(name, modules[name], chosen[name]) for name in parts]
    return chosen


def _named(
    model: nn.Module, target: str, names: Sequence[str], experts: bool = False, roles_only: bool = False
) -> list[str]:
    """Return those of the names that a glob means, or a role's modules, inside of its scope."""
    scope, target = split_scope(target)
    is_role = target in ROLES and (roles_only or not called_like_role(model, target, names))
    names = modules_of_role(model, target) if is_role else [name for name in names if matches(name, target)]
    if target not in ROLES:
        names += [name for name in owners_of_experts(model, target) if name not in names]
    elif experts and target == "all-linear":
        names += expert_modules(model)
    return in_scope(model, scope, names)


def select_parameters(model: nn.Module, patterns: Sequence[str], roles_only: bool = False) -> list[str]:
    """Return the names of base parameters that a pattern matches, or that are in a module that it matches.

    Args:
        model: Where to look.
        patterns: Globs, or roles; a module that is called like a role, and is none of its, comes before the role.
        roles_only: Whether the name of a role means the role in any case, as in settings of methods.

    Raises:
        ValueError: A pattern matches no parameter, or it is unclear what it means; names what the model has.

    Examples:
        >>> from lightning_peft.core import select_parameters
        >>> select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0.weight", "1"])
        ['0.weight', '1.weight', '1.bias']
    """
    first_names = names_of_shared(model)
    chosen = {first_names[name] for name in select_parameter_names(model, patterns, roles_only)}
    return [name for name in base_parameters(model) if name in chosen]


def select_parameter_names(model: nn.Module, patterns: Sequence[str], roles_only: bool = False) -> list[str]:
    """Return the same with each name of a shared parameter for itself, by which its modules can be told apart."""
    if not listed(patterns, "also_train", empty=True):
        return []
    every_name, modules = names_of_shared(model), base_modules(model)
    chosen = set[str]()
    for pattern in patterns:
        scope, end = split_scope(pattern)
        owners = tuple(f"{owner}." for owner in _named(model, pattern, [*modules, *every_name], roles_only=roles_only))
        matching = in_scope(model, scope, [name for name in every_name if matches(name, end)])
        names = {*matching, *(name for name in every_name if name.startswith(owners))}
        chosen |= names or no_match(pattern, modules | base_parameters(model))
    return [name for name in every_name if name in chosen]


def names_of_shared(model: nn.Module) -> dict[str, str]:
    """Return the first name of each base parameter by each name that it has."""
    first_names = {id(parameter): name for name, parameter in base_parameters(model).items()}
    every_name = model.named_parameters(remove_duplicate=False)
    return {name: first_names[id(p)] for name, p in every_name if id(p) in first_names}


def literal(name: str) -> str:
    """Return a glob that matches a name, even where the name is that of a role."""
    return f"[{name[0]}]{name[1:]}" if name in ROLES else name
