"""``trace``: what feeds what in one forward of a model: attention, feed-forwards, outputs. No name is looked at.

The output of every layer is cut from the graph while a hollow twin of the model runs, so that a gradient from a tensor
reaches exactly the last layers before it, feature by feature.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..base_model import outwards
from ..structure import FeedForward
from .attention_finder import AttentionCall, AttentionFinder
from .cut_graph import CutGraph
from .hollow_twin import is_depthwise

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_WITH_GRADIENT = 2**18  # elements up to which it is measured whether an output depends on a parameter


@dataclass(frozen=True)
class Trace:
    """What one forward shows. ``@i`` stands for the attention call of that number, ``#name`` for a module's input.

    Args:
        attention: Attention calls in their order; that of ``nn.MultiheadAttention`` is fed by the module itself.
        reads: Layers that each layer reads.
        entries: What the first input of each module depends on, for modules with others inside.
        order: Names of modules in the order of their first call.
        outputs: Layers that outputs depend on directly.
        feedforward: Feed-forward networks by the name of their down-projection.
        linear_attention: By the name of an output projection, the query, key and value of linear attention with memory
            (RWKV): what multiplies each position, what is remembered nonlinearly, and what linearly.
        reached: Names of parameters, and of layers, on which an output depends.
        read: Names of modules whose parameters were read outside of their calls.
        zero: Names of layers whose inputs were zero in each call.
    """

    attention: list[AttentionCall]
    reads: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    entries: dict[str, set[str]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    outputs: set[str] = field(default_factory=set)
    feedforward: dict[str, FeedForward] = field(default_factory=dict)
    linear_attention: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    zero: set[str] = field(default_factory=set)


def trace(twin: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], linear: Container[str] = ()) -> Trace:
    """Return what one forward of a model's twin shows; raises what the forward raises.

    Args:
        twin: The twin, as ``hollow_twin`` returns it.
        args: Arguments of its forward by position.
        kwargs: Arguments of its forward by name.
        linear: Names of its linear layers, among which feed-forwards are looked for.
    """
    owners = defaultdict[int, set[str]](set)
    for name, module in twin.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                owners[id(parameter)].add(name)
                parameter.requires_grad_(parameter.numel() <= _WITH_GRADIENT)
    listed = {name for name, module in twin.named_modules() if _is_listed(twin, name) and any(module.children())}
    recorder = _Recorder(AttentionFinder(CutGraph(), owners), linear, listed)
    with torch.enable_grad(), _hooks(twin, recorder), recorder.finder:
        output = twin(*args, **kwargs)
    recorder.finish(twin, [x for x in tree_leaves(_plain(output)) if isinstance(x, Tensor) and x.requires_grad])
    return recorder.trace


def _plain(output: Any) -> Any:
    """Return outputs of a model in plain containers."""
    if isinstance(output, Mapping):
        return [_plain(value) for value in output.values()]
    return [_plain(value) for value in output] if isinstance(output, (tuple, list)) else output


@contextmanager
def _hooks(twin: nn.Module, recorder: _Recorder) -> Iterator[None]:
    handles = []
    for name, module in twin.named_modules():
        handles.append(module.register_forward_pre_hook(partial(recorder.enter, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(recorder.leave, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module of a twin is not computed, or has a weight of its own and no modules inside."""
    if "forward" in vars(module):
        return True
    weighted = any(sum(n > 1 for n in p.shape) > 1 for p in module.parameters(recurse=False))
    return weighted and not is_depthwise(module) and not any(True for _ in module.children())


class _Recorder:
    """Hooks of a twin that fill a ``Trace``."""

    def __init__(self, finder: AttentionFinder, linear: Container[str], listed: Container[str]) -> None:
        self.finder, self.graph, self.linear = finder, finder.graph, linear
        self.listed = listed  # modules before which the graph is cut, so that its parts do not grow from block to block
        self.trace = Trace(finder.calls, read=finder.read)
        self.not_zero = set[str]()
        self.seen: dict[str, None] = {}
        self.of_torch: dict[int, str] = {}  # by number of its attention call: the graph is cut around the whole module

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.finder.modules.append(name)
        first = name not in self.seen
        self.seen[name] = None
        inputs = _floating((args, kwargs))
        if _is_layer(module):
            sources = set(self.graph.sources(inputs[0])) if inputs else set()
            self.trace.reads[name] |= sources
            if any(x.any() for x in inputs) or not inputs:
                self.not_zero.add(name)
            projected = 0 < len(sources) < 4 and all(source in self.linear for source in sources)
            if inputs and name in self.linear and projected:
                self._note_network(name, inputs[0], sorted(sources, key=list(self.seen).index))
        elif first and inputs and any(True for _ in module.children()):
            self.trace.entries[name] = set(self.graph.sources(inputs[0]))
        if inputs and name in self.listed:
            return _replaced((args, kwargs), inputs[0], self.graph.cut(f"#{name}", inputs[0], inputs[:1]))
        return None

    def leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self.finder.modules.pop()
        inputs = _floating((args, kwargs))
        if isinstance(module, nn.MultiheadAttention):  # torch reads its weights, so that it is a layer of its own
            rows = torch.ones(module.embed_dim, dtype=torch.bool)
            self.of_torch[len(self.finder.calls)] = name
            self.finder.modules.append(name)
            attended = self.finder.attention([{name: rows}] * 3, list(inputs), output[0], module.num_heads)
            self.finder.modules.pop()
            return attended, *output[1:]
        return self.graph.cut(name, output, inputs) if _is_layer(module) and isinstance(output, Tensor) else None

    def _note_network(self, name: str, x: Tensor, sources: Sequence[str]) -> None:
        """Note whether linear layers and the one that reads them make a feed-forward network, or linear attention."""
        by_memory = [source for source in sources if self.graph.has_memory(x, source)]
        linear = [source for source in sources if self.graph.is_linear(x, source)]
        if len(sources) < 3 and not by_memory and len(linear) < len(sources):  # else there is no activation
            self.trace.feedforward[name] = FeedForward(tuple(sources), linear[0] if linear else None)
        if len(sources) == 3 and len(by_memory) == 2 and len(linear) == 1 and linear[0] in by_memory:
            (query,) = set(sources).difference(by_memory)
            (key,) = set(by_memory).difference(linear)
            self.trace.linear_attention[name] = (query, key, linear[0])

    def finish(self, twin: nn.Module, outputs: list[Tensor]) -> None:
        """Note what outputs depend on."""
        for x in outputs:
            self.trace.outputs.update(self.graph.sources(x))
        layers = self.graph.reached(outputs)
        layers |= {name for number, name in self.of_torch.items() if f"@{number}" in layers}
        self.trace.order.extend(self.seen)
        self.trace.zero.update(set(self.trace.reads) - self.not_zero)
        parameters = dict(twin.named_parameters(remove_duplicate=False))
        reached = set[int]()
        for name, parameter in parameters.items():
            by_gradient = parameter.grad is not None and bool(parameter.grad.any())
            large = not parameter.requires_grad and name.rpartition(".")[0] in self.trace.read
            if by_gradient or large or any(owner in layers for owner in (*outwards(name), "")):
                reached.add(id(parameter))
        self.trace.reached.update(layers, (name for name, p in parameters.items() if id(p) in reached))


def _is_listed(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), LISTS) and bool(name)


def _replaced(arguments: Any, old: Tensor, new: Tensor) -> Any:
    """Return arguments with one tensor replaced."""
    return tree_map_only(Tensor, lambda x: new if x is old else x, arguments)


def _floating(arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.is_floating_point())
