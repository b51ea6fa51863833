"""``ROLES``: functions that find modules by their role (``attention.query``, ``head``...) in a model."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from .base_model import base_modules, is_inside, matches
from .expert_layers import DOWN, UP, expert_modules
from .layer_of import is_called_linear
from .norm_probe import is_norm
from .read_weights import read_weight_attribute
from .structure import LAYER_ROLES
from .structure_of import structure_of
from .transformers_api import outermost_pretrained


def linear_branch(model: nn.Module, down: str) -> str | None:
    """Return the name of the up-projection without activation in a gated feed-forward block; None in other blocks.

    Args:
        model: Model that holds the block.
        down: Name of the block's down-projection.
    """
    network = structure_of(model).feedforward.get(down)
    return None if network is None else network.linear


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of a model by name."""
    return {name: model.get_submodule(name) for name in structure_of(model).names["blocks"]}


def output_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers with weights that follow the last block; without blocks, of the last layers."""
    return list(structure_of(model).names["output"])


def head_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers with weights in a task's head: the output layers that were not pretrained.

    In transformers' models these are outside of the backbone and of the layers that predict its vocabulary.
    """
    pretrained = tuple(itertools.chain.from_iterable(_pretrained(name, m) for name, m in outermost_pretrained(model)))
    return [name for name in output_layers(model) if not f".{name}.".startswith(pretrained)]


def _pretrained(name: str, module: Any) -> Iterator[str]:
    """Yield prefixes of the backbone, and of all children up to the one that predicts the vocabulary."""
    prefix = f".{name}." if name else "."
    output = module.get_output_embeddings()
    modules_of = {key: set(child.modules()) for key, child in module.named_children()}
    last = max((i for i, modules in enumerate(modules_of.values()) if output in modules), default=-1)
    for i, (key, modules) in enumerate(modules_of.items()):
        if i <= last or module.base_model in modules:
            yield f"{prefix}{key}."
    if module.base_model is module:
        yield prefix


def norms(model: nn.Module) -> list[str]:
    """Return the names of the normalization layers that have parameters."""
    return [name for name, module in base_modules(model).items() if is_norm(module)]


def _of_structure(role: str, model: nn.Module) -> list[str]:
    return list(structure_of(model).names[role])


def _all_linear(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of the blocks; without blocks, of all but the last linear layer.

    Of blocks without linear layers, as those of ResNet, they are the convolutions.
    """
    modules = base_modules(model)
    linear = [n for n, m in modules.items() if is_called_linear(m) or read_weight_attribute(type(m))]
    inside = tuple(f"{name}." for name in blocks(model))
    if inside and not any(f"{name}.".startswith(inside) for name in linear):
        linear = [n for n, m in modules.items() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    known = set(linear)
    subclasses = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n.startswith(inside)]
    if others := [name for name in subclasses if name not in known]:
        described = ", ".join(f"{name} ({type(modules[name]).__name__})" for name in others[:5])
        warnings.warn(f"all-linear leaves out {len(others)} layers that are not linear: {described}.", stacklevel=2)
    return [n for n in linear if f"{n}.".startswith(inside)] if inside else linear[:-1]


EXPERT_ROLES = (UP, DOWN)
WEIGHT_ROLES = (*LAYER_ROLES, *EXPERT_ROLES, "all-linear")  # roles of weights, of those that a module only reads, too
ROLES: dict[str, Callable[[nn.Module], Iterable[str]]] = {
    **{role: partial(_of_structure, role) for role in (*LAYER_ROLES, "attention")},
    **{role: partial(expert_modules, role=role) for role in EXPERT_ROLES},
    "all-linear": _all_linear,
    "blocks": blocks,
    "output": output_layers,
    "head": head_layers,
    "norms": norms,
}
_NAMES_OF_MODULES = ("blocks", "head", "norms", "output")  # roles after which modules of other kinds are called, too


def called_like_role(model: nn.Module, role: str, names: Sequence[str]) -> bool:
    """Return whether the name of a role means what is called so, since the role means something else, or more.

    Args:
        model: The model.
        role: Name of a role.
        names: Names of its modules, and of parameters if these are meant as well.

    Raises:
        ValueError: Several are called so, and the role means others.
    """
    if role not in _NAMES_OF_MODULES or not (called_so := [name for name in names if matches(name, role)]):
        return False
    members, whole_name = list(ROLES[role](model)), [name for name in called_so if name == role]
    if _overlap(whole_name or called_so, members):
        return False
    if members and len(called_so) > 1:
        raise ValueError(
            f"{role!r} is unclear: {', '.join(called_so[:4])}{', ...' * (len(called_so) > 4)} are called so, and as a "
            f"role it means {', '.join(members[:4])}. Write more of the names that you mean."
        )
    return True


def _overlap(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether each name is that of something inside or around one of the others, and the other way round."""
    pairs = {(a, b) for a in names for b in others if is_inside(a, b) or is_inside(b, a)}
    return {a for a, _ in pairs} == set(names) and {b for _, b in pairs} == set(others)
