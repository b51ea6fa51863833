"""``traced_blocks`` and ``traced_output``: the repeated blocks of a traced model, and the layers that follow them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable

from torch import nn

from ..base_model import is_inside
from .trace import LISTS, Trace


def traced_blocks(model: nn.Module, traced: Trace) -> list[str]:
    """Return the names of the blocks: children of one module of which each reads what the one before computed.

    They are the children of lists; without any, children of other modules that call attention or are of one class. Of
    lists in lists, the inner ones hold the blocks if classes repeat there (stages), else the outer ones. Where blocks
    of some lists call attention, those of others are none.

    Args:
        model: The model.
        traced: Its trace.
    """
    listed, others = _chains(model, traced)
    chains = _outer_or_inner(model, listed) or others
    attending = [chain for chain in chains if any(_calls_attention(traced, name) for name in chain)]
    return [name for chain in attending or chains for name in chain]


def _chains(model: nn.Module, traced: Trace) -> tuple[list[list[str]], list[list[str]]]:
    """Return chains of children of lists, and of other modules."""
    siblings = defaultdict[str, list[str]](list)
    for name in traced.order:
        if name and sum(p.dim() > 1 for p in model.get_submodule(name).parameters()) > 1:
            siblings[name.rpartition(".")[0]].append(name)
    listed, others = [], []
    for parent, names in siblings.items():
        if isinstance(model.get_submodule(parent), LISTS):
            if _is_chain(names, traced):
                listed.append(names)
        else:
            attending = [name for name in names if _calls_attention(traced, name)]
            repeated = attending or [n for n in names if _class(model, n) is _class(model, names[0])]
            if len(repeated) > 1 and _is_chain(repeated, traced):
                others.append(repeated)
    return listed, others


def _outer_or_inner(model: nn.Module, chains: list[list[str]]) -> list[list[str]]:
    dropped = list[list[str]]()
    for outer in chains:
        inner = [chain for chain in chains if chain is not outer and any(is_inside(chain[0], name) for name in outer)]
        stages = any(len({_class(model, name) for name in chain}) < len(chain) for chain in inner)
        dropped += [outer] if stages else inner
    return [chain for chain in chains if chain not in dropped]


def _class(model: nn.Module, name: str) -> type[nn.Module]:
    module = model.get_submodule(name)
    return getattr(type(module), "_host_class", type(module))


def _calls_attention(traced: Trace, name: str) -> bool:
    return any(name in call.modules for call in traced.attention)


def _is_chain(names: list[str], traced: Trace) -> bool:
    pairs = itertools.pairwise(names)
    return all(_computes(before, traced.entries.get(after, ()), traced) for before, after in pairs)


def _computes(name: str, sources: Collection[str], traced: Trace) -> bool:
    """Return whether one of these layers and attention calls is inside a module."""
    for source in sources:
        if source.startswith("@"):
            if name in traced.attention[int(source[1:])].modules:
                return True
        elif is_inside(source, name):
            return True
    return False


def traced_output(traced: Trace, blocks: Collection[str]) -> list[str]:
    """Return the layers on the way from the blocks to the outputs; without blocks, those that outputs read.

    Args:
        traced: The trace of a model.
        blocks: Names of its blocks.
    """
    layers = [name for name in traced.order if name in traced.reads]
    if not blocks:
        return [name for name in layers if name in traced.outputs]
    inside = {name for name in layers if any(is_inside(name, block) for block in blocks)}
    reaching, feeding = _upstream(traced.outputs, traced), _upstream(inside, traced)
    after = set[str]()
    for name in layers:  # in the order of their calls
        sources = set(traced.reads[name])
        for given in [source for source in sources if source.startswith("#")]:
            sources |= traced.entries.get(given[1:], set())
        if any(source in inside or source in after or source.startswith("@") for source in sources):
            after.add(name)
    return [name for name in layers if name in reaching and name in after and name not in feeding]


def _upstream(names: Iterable[str], traced: Trace) -> set[str]:
    """Return layers with all that they depend on."""
    found, todo = set[str](), list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        if name.startswith("@"):
            call = traced.attention[int(name[1:])]
            todo += [*call.query, *call.key, *call.value]
        elif name.startswith("#"):
            todo += traced.entries.get(name[1:], ())
        else:
            todo += traced.reads.get(name, ())
    return found
