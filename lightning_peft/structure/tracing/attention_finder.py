"""``AttentionFinder``: finds attention calls in a forward, those of torch and a softmax between two products."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .cut_graph import CutGraph, Sources

_OPERANDS = ("query", "key", "value")
_PRODUCTS = {"matmul", "bmm", "__matmul__", "baddbmm", "einsum"}


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention, with the layers that feed it.

    Args:
        query: Layers that feed the query, with their features; so for the others.
        key: Layers that feed the key.
        value: Layers that feed the value.
        modules: Names of the modules whose calls were going on, outermost first.
        heads: Number of heads of the query; None where products do not tell.
    """

    query: Sources
    key: Sources
    value: Sources
    modules: tuple[str, ...]
    heads: int | None


class AttentionFinder(TorchFunctionMode):
    """Lists attention calls, cuts their outputs from the graph, and lists parameters that a call of another reads.

    Args:
        graph: The graph of the forward.
        owners: Names of the modules that own each parameter, by the parameter's id.
    """

    def __init__(self, graph: CutGraph, owners: dict[int, set[str]]) -> None:
        super().__init__()
        self.graph, self.owners = graph, owners
        self.calls = list[AttentionCall]()
        self.modules: list[str] = []  # whose calls are going on
        self.read = set[str]()  # modules whose parameters were read outside of their calls
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []  # (a, b, a b) since the last softmax
        self.softmax: list[tuple[Tensor, Tensor, Sources, Sources]] = []  # probabilities without a value yet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(output, Tensor):
            self._note_reads((*args, *(kwargs or {}).values()))
        if func is F.scaled_dot_product_attention:
            call = dict(zip(_OPERANDS, args, strict=False)) | (kwargs or {})
            sources = [self.graph.sources(call[operand]) for operand in _OPERANDS]
            inputs = [x for x in call.values() if isinstance(x, Tensor)]
            return self.attention(sources, inputs, output, output.shape[-3] if output.dim() > 3 else None)
        if name == "softmax" and isinstance(output, Tensor) and output.dim() > 2 and output.requires_grad:
            return self._softmax(args[0], output)
        if name in _PRODUCTS and isinstance(output, Tensor):
            return self._product([x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)][-2:], output)
        return output

    def attention(self, operands: list[Sources], inputs: list[Tensor], output: Tensor, heads: int | None) -> Tensor:
        """Note one call, with the layers that feed query, key and value, and cut its output from the graph."""
        query, key, value = ({n: f for n, f in sources.items() if n[0] not in "@#"} for sources in operands)
        self.calls.append(AttentionCall(query, key, value, tuple(self.modules), heads))
        return self.graph.cut(f"@{len(self.calls) - 1}", output, tuple(inputs))

    def _note_reads(self, values: Iterable[Any]) -> None:
        for value in values:
            owners = self.owners.get(id(value))
            if owners and owners.isdisjoint(self.modules):
                self.read |= owners

    def _softmax(self, scores: Tensor, output: Tensor) -> Tensor:
        # Of several products in a sum, the first is that of query and key, and the others are with positions (DeBERTa).
        pairs = [(a, b) for a, b, product in self.products if self.graph.depends(scores, product)]
        self.products.clear()
        if not pairs:
            return output
        query, key = map(self.graph.sources, pairs[0])
        probabilities = output.detach().requires_grad_()
        self.softmax.append((probabilities, scores, query, key))
        return probabilities

    def _product(self, factors: list[Tensor], output: Tensor) -> Tensor:
        if len(factors) < 2 or not all(x.requires_grad for x in factors):
            return output
        for number, (probabilities, scores, query, key) in enumerate(self.softmax):
            first = self.graph.depends(factors[0], probabilities)
            if first or self.graph.depends(factors[1], probabilities):
                del self.softmax[number]
                value = factors[first]
                heads = scores.shape[1] if scores.dim() > 3 else None
                return self.attention([query, key, self.graph.sources(value)], [scores, value], output, heads)
        self.products.append((*factors, output))  # type: ignore[arg-type]
        return output
