"""``named_structure``: the structure of a model as the names and the order of its modules suggest it.

It serves models that cannot be traced, and as a cache for families of which a test shows that a trace finds the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from torch import nn

from .base_model import base_modules, matches_any
from .fused_rows import fused_patterns, lacks_query
from .layer_of import is_called_linear, layer_of
from .read_weights import read_weight_attribute
from .structure import LAYER_ROLES, FeedForward, Structure

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


def named_structure(model: nn.Module) -> Structure:
    """Return the structure that names suggest."""
    modules = base_modules(model)
    blocks = _blocks(model, modules)
    inside = tuple(f"{block}." for block in blocks) or ("",)
    names = {role: [n for n in _named(role, modules) if n.startswith(inside)] for role in LAYER_ROLES}
    names |= {"attention": _attention(names["attention.key"], modules), "blocks": blocks}
    names |= {"output": _output(modules, blocks), "called": list(modules)}
    return Structure(names, dict(_feedforward(model, names)))


def _named(role: str, modules: dict[str, nn.Module]) -> Iterator[str]:
    patterns = (*_NAMES[role], *fused_patterns(role))
    for name, module in modules.items():
        named = matches_any(name, patterns) and is_called_linear(module)
        named = named and not (role == "attention.query" and lacks_query(name))
        reads = (isinstance(module, nn.MultiheadAttention) and bool(fused_patterns(role))) or (
            role == "attention.output" and read_weight_attribute(type(module)) == "weight"
        )
        if named or reads:
            yield name


def _attention(keys: Sequence[str], modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the modules that hold key projections, alone or fused, and of ``nn.MultiheadAttention``."""
    of_torch = {n for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
    parents = {name.rpartition(".")[0] for name in keys if name not in of_torch}
    return [n for n in modules if n in parents | of_torch]


def _blocks(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Return the children, all of one class, of outermost lists and sequences."""
    repeated: list[str] = []
    for name, module in [("", model), *modules.items()]:
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(name.startswith(f"{b}.") for b in repeated):
            children = dict(module.named_children())
            if len({type(child) for child in children.values()}) == 1 and any(True for _ in module.parameters()):
                repeated += [f"{name}.{key}".lstrip(".") for key in children]
    return repeated


def _output(modules: dict[str, nn.Module], blocks: Sequence[str]) -> list[str]:
    """Return the layers with weights registered after the last block; without blocks, the last layer."""
    leaves = [n for n, m in modules.items() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    if not blocks:
        return leaves[-1:]
    order = {name: position for position, name in enumerate(modules)}
    end = max(order[name] for name in order if f"{name}.".startswith(f"{blocks[-1]}."))
    return [name for name in leaves if order[name] > end]


def _feedforward(model: nn.Module, names: dict[str, list[str]]) -> Iterator[tuple[str, FeedForward]]:
    """Yield down-projections with their network: the nearest of the up-projections before it in the model's order."""
    ups, downs = set(names["feedforward.up"]), set(names["feedforward.down"])
    before = list[str]()
    for name in names["called"]:
        if name in ups:
            before.append(name)
        elif name in downs and before:
            depth = {up: len(os.path.commonprefix([up.split("."), name.split(".")])) for up in before}
            nearest = tuple(up for up in before if depth[up] == max(depth.values()))
            yield name, FeedForward(nearest, _linear_branch(model, name, nearest))
            before.clear()


def _linear_branch(model: nn.Module, down: str, ups: Sequence[str]) -> str | None:
    """Return the up-projection without activation in a gated feed-forward block; None in other blocks."""
    by_child = {up.rpartition(".")[2]: up for up in ups}
    linear = next((by_child[up] for gate, up in _GATED.items() if gate in by_child and up in by_child), None)
    if linear is None:
        return None
    up, host = model.get_submodule(linear), model.get_submodule(down)
    return linear if layer_of(up).shape(up)[0] == layer_of(host).shape(host)[1] else None
