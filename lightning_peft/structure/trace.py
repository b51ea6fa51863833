"""``trace``: which layers, and which of their features, feed query, key and value of each attention call.

The output of every layer is cut from the graph while a hollow twin of the model runs, so that a gradient from a tensor
reaches exactly the last layers before it, feature by feature. No name is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..ops.torch_api import without_function_modes
from .hollow_twin import hollow_twin

_OPERANDS = ("query", "key", "value")
_PRODUCTS = {"matmul", "bmm", "__matmul__", "baddbmm", "einsum"}

Sources = dict[str, Tensor]  # by name of a layer, for each of its features whether it matters


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention, with the layers that feed it.

    Args:
        query: Layers that feed the query, with their features; so for the others.
        key: Layers that feed the key.
        value: Layers that feed the value.
    """

    query: Sources
    key: Sources
    value: Sources


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[AttentionCall]:
    """Return the attention calls in one forward of the model's twin; raises what the forward raises."""
    twin, tracer = hollow_twin(model), _Tracer()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _hooks(twin, tracer), tracer:
        twin(*args, **kwargs)
    return tracer.calls


@contextmanager
def _hooks(twin: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """Context in which the tracer cuts the output of each layer from the graph."""
    handles = [module.register_forward_hook(partial(_cut, tracer, name)) for name, module in twin.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cut(tracer: _Tracer, name: str, module: nn.Module, args: Any, output: Any) -> Any:
    layer = any(p.dim() > 1 for p in module.parameters(recurse=False)) and not any(True for _ in module.children())
    return tracer.cut(name, output) if layer and isinstance(output, Tensor) else None


class _Tracer(TorchFunctionMode):
    """Cuts the graph at attention calls: those of torch, and a softmax between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = list[AttentionCall]()
        self.leaves: list[tuple[str, Tensor]] = []
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []  # (a, b, a b) since the last softmax
        self.softmax: list[tuple[Tensor, Sources, Sources]] = []  # (probabilities, query, key), without a value yet

    def cut(self, name: str, output: Tensor) -> Tensor:
        """Make a tensor a leaf of the graph under a name, and return it."""
        if not output.is_floating_point():
            return output
        leaf = output.detach().requires_grad_()
        self.leaves.append((name, leaf))
        return leaf.clone()

    def sources(self, x: Any) -> Sources:
        """Return the leaves that a tensor depends on, with the features that matter."""
        if not isinstance(x, Tensor) or not x.requires_grad:
            return {}
        with without_function_modes():
            seed = torch.rand_like(x) + 0.5
            leaves = [leaf for _, leaf in self.leaves]
            gradients = torch.autograd.grad(x, leaves, seed, allow_unused=True, retain_graph=True)
        found: Sources = {}
        for (name, _), gradient in zip(self.leaves, gradients, strict=True):
            if gradient is not None and (matters := gradient.flatten(0, -2).ne(0).any(0)).any():
                known = found.get(name)
                found[name] = matters if known is None or known.shape != matters.shape else known | matters
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            call = dict(zip(_OPERANDS, args, strict=False)) | (kwargs or {})
            return self._attention(*(self.sources(call[name]) for name in _OPERANDS), output=output)
        name = getattr(func, "__name__", "")
        if name == "softmax" and isinstance(output, Tensor) and output.dim() > 2 and output.requires_grad:
            return self._softmax(args[0], output)
        if name in _PRODUCTS and isinstance(output, Tensor):
            return self._product([x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)][-2:], output)
        return output

    def _attention(self, *operands: Sources, output: Tensor) -> Tensor:
        layers = [{n: f for n, f in sources.items() if not n.startswith("@")} for sources in operands]
        self.calls.append(AttentionCall(*layers))
        return self.cut(f"@{len(self.calls) - 1}", output)

    def _softmax(self, scores: Tensor, output: Tensor) -> Tensor:
        pairs = [(a, b) for a, b, product in self.products if self._depends(scores, product)]
        self.products.clear()
        if not pairs:
            return output
        query, key = ({k: v for pair in pairs for k, v in self.sources(pair[side]).items()} for side in (0, 1))
        probabilities = output.detach().requires_grad_()
        self.softmax.append((probabilities, query, key))
        return probabilities

    def _product(self, factors: list[Tensor], output: Tensor) -> Tensor:
        if len(factors) < 2 or not all(x.requires_grad for x in factors):
            return output
        for entry in self.softmax:
            probabilities, query, key = entry
            if (first := self._depends(factors[0], probabilities)) or self._depends(factors[1], probabilities):
                self.softmax.remove(entry)
                return self._attention(query, key, self.sources(factors[first]), output=output)
        self.products.append((*factors, output))  # type: ignore[arg-type]
        return output

    def _depends(self, x: Tensor, on: Tensor) -> bool:
        if x is on or not (x.requires_grad and on.requires_grad) or x.is_leaf:
            return x is on
        with without_function_modes():
            (gradient,) = torch.autograd.grad(x, on, torch.ones_like(x), allow_unused=True, retain_graph=True)
        return gradient is not None
