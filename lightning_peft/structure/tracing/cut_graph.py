"""``CutGraph``: the graph of one forward, cut behind each layer: a gradient reaches the last layers before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.torch_api import without_function_modes

Sources = dict[str, Tensor]  # by name of a layer, for each of its features whether it matters


class Leaf(NamedTuple):
    """Output of a layer or of an attention call, from which the graph begins anew.

    Args:
        name: Name of the layer.
        tensor: The output, a leaf of the graph.
        inputs: What the layer was called with.
    """

    name: str
    tensor: Tensor
    inputs: tuple[Tensor, ...]


class CutGraph:
    """Cuts outputs of layers from the graph, and tells on which of them a tensor depends."""

    def __init__(self) -> None:
        self.leaves: list[Leaf] = []

    def cut(self, name: str, output: Tensor, inputs: tuple[Tensor, ...] = ()) -> Tensor:
        """Put a leaf of the graph in place of a tensor, with random values, and return it."""
        if not output.is_floating_point():
            return output
        # Random values, where activations are neither linear nor constant; zeros stay, since they are looked for.
        leaf = (torch.randn_like(output) if output.any() else torch.zeros_like(output)).requires_grad_()
        self.leaves.append(Leaf(name, leaf, tuple(x for x in inputs if x.requires_grad)))
        return leaf.clone()

    def sources(self, x: Any) -> Sources:
        """Return the leaves that a tensor depends on, with the features that matter."""
        found: Sources = {}
        for leaf, gradient in self._gradients(x):
            if (matters := gradient.flatten(0, -2).ne(0).any(0)).any():
                known = found.get(leaf.name)
                found[leaf.name] = matters if known is None or known.shape != matters.shape else known | matters
        return found

    def _gradients(self, x: Any) -> Iterator[tuple[Leaf, Tensor]]:
        if not isinstance(x, Tensor) or not x.requires_grad or not self.leaves:
            return
        with without_function_modes():
            seed = _random(x)
            inputs = [leaf.tensor for leaf in self.leaves]
            gradients = torch.autograd.grad(x, inputs, seed, allow_unused=True, retain_graph=True)
        yield from ((leaf, g) for leaf, g in zip(self.leaves, gradients, strict=True) if g is not None)

    def has_memory(self, x: Tensor, name: str) -> bool:
        """Return whether x (..., positions, features) depends on earlier positions of a layer's output alone."""
        leaf = self._last(name)
        if leaf.shape[:-1] != x.shape[:-1] or x.dim() < 2:
            return True
        with without_function_modes():
            first, last = (
                torch.autograd.grad(x[..., position, :].sum(), leaf, retain_graph=True)[0] for position in (0, -1)
            )
        return bool(last[..., :-1, :].any()) and not first[..., 1:, :].any()

    def is_linear(self, x: Tensor, name: str) -> bool:
        """Return whether x depends linearly on the output of a layer: whether its gradient does not depend on it."""
        leaf = self._last(name)
        with without_function_modes():
            seed = _random(x)
            (gradient,) = torch.autograd.grad(x, leaf, seed, retain_graph=True, create_graph=True)
            if gradient.requires_grad:
                weights = torch.rand_like(gradient)  # a plain sum does not change where a softmax is inside
                (again,) = torch.autograd.grad(gradient, leaf, weights, allow_unused=True, retain_graph=True)
                if again is not None and again.any():
                    return False
            zeros = gradient == 0
            return not zeros.any() or bool((leaf[zeros] > 0).any() and (leaf[zeros] < 0).any())  # ReLU has one sign

    def _last(self, name: str) -> Tensor:
        return next(leaf.tensor for leaf in reversed(self.leaves) if leaf.name == name)

    def depends(self, x: Tensor, on: Tensor) -> bool:
        """Return whether one tensor depends on another."""
        if x is on or not (x.requires_grad and on.requires_grad) or x.is_leaf:
            return x is on
        with without_function_modes():
            (gradient,) = torch.autograd.grad(x, on, torch.ones_like(x), allow_unused=True, retain_graph=True)
        return gradient is not None

    def reached(self, outputs: list[Tensor]) -> set[str]:
        """Return the layers on which outputs depend, directly or through others; parameters get gradients, too."""
        found = set[str]()
        with without_function_modes():
            _backward(outputs)
            for leaf in reversed(self.leaves):
                if leaf.tensor.grad is not None and leaf.tensor.grad.any():
                    found.add(leaf.name)
                    mixes = leaf.name.startswith("@")  # attention mixes positions, layers of features do not
                    _backward(leaf.inputs, None if mixes else leaf.tensor.grad)
        return found


def _backward(tensors: Sequence[Tensor], later: Tensor | None = None) -> None:
    """Propagate a gradient from tensors, at positions where ``later``, the gradient of what reads them, has some."""
    for x in tensors:
        if x.requires_grad:
            seed = _random(x)
            if later is not None and later.shape[:-1] == x.shape[:-1]:
                seed = seed * later.ne(0).any(-1, keepdim=True)
            torch.autograd.backward(x, seed, retain_graph=True)


def _random(x: Tensor) -> Tensor:
    """Return positive numbers of the shape of a tensor, different for each feature: their sum never cancels out."""
    return (torch.rand(x.shape[-1:]) + 0.5).expand_as(x)
