"""Roles: what the parts of a model are for, by the names of the families that people use and by where they stand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from .base_model import base_modules, matches
from .fused_rows import fused_patterns, lacks_query
from .layer_types import is_called_linear, layer_of, read_weight_attribute

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
_GATED = {"gate_proj": "up_proj", "wi_0": "wi_1"}  # the activated one, and what it is multiplied with


def linear_branch(model: nn.Module, down: str) -> str | None:
    """Return the up-projection that is not activated, of a block that multiplies two before its down-projection."""
    holder = down.rpartition(".")[0]
    siblings = dict(model.get_submodule(holder).named_children())
    found = next((up for gate, up in _GATED.items() if gate in siblings and up in siblings), None)
    if found is None or layer_of(siblings[found]).shape(siblings[found])[0] != _width(model, down):
        return None
    return f"{holder}.{found}".lstrip(".")


def _width(model: nn.Module, name: str) -> int:
    host = model.get_submodule(name)
    return layer_of(host).shape(host)[1]


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of a model (encoder before decoder): equal neighbours in an outermost list."""
    found: dict[str, nn.Module] = {}
    for name, module in [("", model), *base_modules(model).items()]:
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(name.startswith(f"{b}.") for b in found):
            children = dict(module.named_children())
            if len({type(child) for child in children.values()}) == 1 and any(True for _ in module.parameters()):
                found |= {f"{name}.{key}".lstrip("."): child for key, child in children.items()}
    return found


def output_layers(model: nn.Module) -> list[str]:
    """Return the names of the weighted layers that follow the last block; without blocks, of the last layer."""
    modules = base_modules(model)
    leaves = [n for n, m in modules.items() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    last = next(reversed(blocks(model)), None)
    if last is None:
        return leaves[-1:]
    order = {name: position for position, name in enumerate(modules)}
    end = max(order[name] for name in order if f"{name}.".startswith(f"{last}."))
    return [name for name in leaves if order[name] > end]


def head_layers(model: nn.Module) -> list[str]:
    """Return the names of the weighted layers of a task's head: the output layers that no backbone was trained with.

    Of transformers' models these are outside the backbone and no part of what predicts its vocabulary.
    """
    without = tuple(itertools.chain.from_iterable(_pretrained(name, m) for name, m in _outermost_pretrained(model)))
    return [name for name in output_layers(model) if not f".{name}.".startswith(without)]


def _outermost_pretrained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    found = list[str]()
    for name, module in [("", model), *base_modules(model).items()]:
        embeds = callable(getattr(type(module), "get_input_embeddings", None))  # torch.compile shows its model's own
        inside = any(name.startswith(other) for other in found)
        if embeds and isinstance(getattr(module, "base_model", None), nn.Module) and not inside:
            found.append(f"{name}.".lstrip("."))
            yield name, module


def _pretrained(name: str, module: Any) -> Iterator[str]:
    """Yield prefixes of the backbone, and of all children up to the one that predicts the vocabulary."""
    place = f".{name}." if name else "."
    output = module.get_output_embeddings()
    children = {key: set(child.modules()) for key, child in module.named_children()}
    last = max((i for i, own in enumerate(children.values()) if output in own), default=-1)
    for i, (key, own) in enumerate(children.items()):
        if i <= last or module.base_model in own:
            yield f"{place}{key}."
    if module.base_model is module:
        yield place


def norms(model: nn.Module) -> list[str]:
    """Return the names of the normalization layers that have parameters, known by their type's name."""
    own = {n: list(m.parameters(recurse=False)) for n, m in base_modules(model).items() if _is_norm(m)}
    return [name for name, found in own.items() if found and all(p.dim() == 1 for p in found)]


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def attention_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that hold key projections, alone or fused, and of torch's own attention."""
    modules = base_modules(model)
    torch_own = {n for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
    holders = {name.rpartition(".")[0] for name in _named("attention.key")(model) if name not in torch_own}
    return [n for n in modules if n in holders | torch_own]


def _named(role: str) -> Callable[[nn.Module], Iterable[str]]:
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
    """Linear layers of the blocks; of a model without blocks, all but the output layer."""
    linear = [n for n, m in base_modules(model).items() if is_called_linear(m) or read_weight_attribute(type(m))]
    inside = tuple(f"{name}." for name in blocks(model))
    return [n for n in linear if f"{n}.".startswith(inside)] if inside else linear[:-1]


WEIGHT_ROLES = (*_NAMES, "all-linear")  # mean weights, also those that a module reads from its children
ROLES: dict[str, Callable[[nn.Module], Iterable[str]]] = {
    **{role: _named(role) for role in _NAMES},
    "attention": attention_modules,
    "all-linear": _all_linear,
    "blocks": blocks,
    "output": output_layers,
    "head": head_layers,
    "norms": norms,
}
