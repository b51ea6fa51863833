"""``ROLES``: functions that find layers by their role (``attention.query``, ``head``...), from names and positions."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from .base_model import base_modules, matches
from .fused_rows import fused_patterns, lacks_query
from .layer_of import is_called_linear, layer_of
from .read_weights import read_weight_attribute
from .transformers_api import outermost_pretrained

_NAMES = {
    "attention.query": (
        *("query", "query_proj", "q_lin", "q_proj", "q_attn", "SelfAttention.q", "EncDecAttention.q", "wq"),
    ),
    "attention.key": ("key", "key_proj", "k_lin", "k_proj", "SelfAttention.k", "EncDecAttention.k", "wk"),
    "attention.value": ("value", "value_proj", "v_lin", "v_proj", "SelfAttention.v", "EncDecAttention.v", "wv"),
    "attention.output": (
        *("attention.output.dense", "out_lin", "o_proj", "out_proj", "attn.c_proj", "attn.proj"),
        *("SelfAttention.o", "EncDecAttention.o", "crossattention.c_proj"),
    ),
    "feedforward.up": (
        *("intermediate.dense", "lin1", "up_proj", "gate_proj", "gate_up_proj", "c_fc", "fc1"),
        *("DenseReluDense.wi*", "linear1"),
    ),
    "feedforward.down": (
        *("*[0-9].output.dense", "lin2", "down_proj", "mlp.c_proj", "fc2", "DenseReluDense.wo", "linear2"),
    ),
}
_GATED = {"gate_proj": "up_proj", "wi_0": "wi_1"}  # the activated projection, and the one it is multiplied with


def linear_branch(model: nn.Module, down: str) -> str | None:
    """Return the name of the up-projection without activation in a gated feed-forward block; None in other blocks.

    Args:
        model: Model that holds the block.
        down: Name of the block's down-projection.
    """
    parent = down.rpartition(".")[0]
    siblings = dict(model.get_submodule(parent).named_children())
    key = next((up for gate, up in _GATED.items() if gate in siblings and up in siblings), None)
    if key is None:
        return None
    up, host = siblings[key], model.get_submodule(down)
    same_width = layer_of(up).shape(up)[0] == layer_of(host).shape(host)[1]
    return f"{parent}.{key}".lstrip(".") if same_width else None


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of a model: the children, all of one class, of outermost lists and sequences."""
    repeated: dict[str, nn.Module] = {}
    for name, module in [("", model), *base_modules(model).items()]:
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(name.startswith(f"{b}.") for b in repeated):
            children = dict(module.named_children())
            if len({type(child) for child in children.values()}) == 1 and any(True for _ in module.parameters()):
                repeated |= {f"{name}.{key}".lstrip("."): child for key, child in children.items()}
    return repeated


def output_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers with weights that follow the last block; without blocks, of the last layer."""
    modules = base_modules(model)
    leaves = [n for n, m in modules.items() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    last = next(reversed(blocks(model)), None)
    if last is None:
        return leaves[-1:]
    order = {name: position for position, name in enumerate(modules)}
    end = max(order[name] for name in order if f"{name}.".startswith(f"{last}."))
    return [name for name in leaves if order[name] > end]


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
    """Return the names of the normalization layers that have parameters, recognized by the name of their class."""
    modules = {name: m for name, m in base_modules(model).items() if type(m).__name__.endswith("Norm")}
    parameters = {name: list(module.parameters(recurse=False)) for name, module in modules.items()}
    return [name for name, vectors in parameters.items() if vectors and all(p.dim() == 1 for p in vectors)]


def attention_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that hold key projections, alone or fused, and of ``nn.MultiheadAttention``."""
    modules = base_modules(model)
    of_torch = {n for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
    parents = {name.rpartition(".")[0] for name in _named("attention.key")(model) if name not in of_torch}
    return [n for n in modules if n in parents | of_torch]


def _named(role: str) -> Callable[[nn.Module], Iterable[str]]:
    """Return the function that yields the names of a role's layers, by the names that model families use."""
    patterns = (*_NAMES[role], *fused_patterns(role))

    def find(model: nn.Module) -> Iterator[str]:
        for name, module in base_modules(model).items():
            named = is_called_linear(module) and any(matches(name, pattern) for pattern in patterns)
            named = named and not (role == "attention.query" and lacks_query(name))
            reads = (isinstance(module, nn.MultiheadAttention) and bool(fused_patterns(role))) or (
                role == "attention.output" and read_weight_attribute(type(module)) == "weight"
            )
            if named or reads:
                yield name

    return find


def _all_linear(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of the blocks; without blocks, of all but the last linear layer."""
    modules = base_modules(model)
    linear = [n for n, m in modules.items() if is_called_linear(m) or read_weight_attribute(type(m))]
    inside = tuple(f"{name}." for name in blocks(model))
    known = set(linear)
    subclasses = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n.startswith(inside)]
    if others := [name for name in subclasses if name not in known]:
        described = ", ".join(f"{name} ({type(modules[name]).__name__})" for name in others[:5])
        warnings.warn(f"all-linear leaves out {len(others)} layers that are not linear: {described}.", stacklevel=2)
    return [n for n in linear if f"{n}.".startswith(inside)] if inside else linear[:-1]


WEIGHT_ROLES = (*_NAMES, "all-linear")  # roles that mean weights, also those that a module reads from its children
ROLES: dict[str, Callable[[nn.Module], Iterable[str]]] = {
    **{role: _named(role) for role in _NAMES},
    "attention": attention_modules,
    "all-linear": _all_linear,
    "blocks": blocks,
    "output": output_layers,
    "head": head_layers,
    "norms": norms,
}
