"""Tensors that tell when they are used: what a frozen trunk returns, on its way to what trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Place = tuple[int, int]  # which call of the trunk, and which tensor of what it returned

_METADATA = {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_contiguous", "is_complex"}
_METADATA |= {"__get__", "__len__", "__hash__", "__repr__", "ndimension", "nelement", "get_device", "data_ptr", "type"}


class Watch(Protocol):
    """Who is told of uses."""

    past_trunk: bool  # whether something that trains has started: from then on, any computation is a use

    def use(self, places: Iterable[Place]) -> None:
        """Note that the values from these places matter."""


class UseTrackingTensor(Tensor):
    """Tensor that remembers where its values come from; what is computed from it remembers that, too.

    Shapes and types are no values. A use is: what meets something that trains, what is read as a number, what is
    written into another tensor. Anything unknown is a use.
    """

    places: frozenset[Place]
    watch: Watch

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        name, tensors = getattr(func, "__name__", ""), [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not given or name.startswith("new_") or name.endswith("_like") or (name in _METADATA and not tensors):
            return tree_map(_untraced, result)
        places, watch = frozenset[Place]().union(*(x.places for x in given)), given[0].watch
        written = name == "__setitem__" or "out" in kwargs or (name.endswith("_") and not name.endswith("__"))
        used = not tensors or (written and not isinstance(args[0], cls))
        if used or watch.past_trunk or any(x.requires_grad for x in tensors):
            watch.use(places)
            return tree_map(_untraced, result)
        return tree_map(lambda x: trace(x, places, watch) if isinstance(x, Tensor) else x, result)


def trace(tensor: Tensor, places: Iterable[Place], watch: Watch) -> Tensor:
    """Return a tensor with the same values that remembers these places."""
    if isinstance(tensor, UseTrackingTensor):  # an in-place function returns what it was given
        tensor.places |= frozenset(places)
        return tensor
    traced = tensor.as_subclass(UseTrackingTensor)
    traced.places, traced.watch = frozenset(places), watch
    return traced


def used(values: Any) -> Any:
    """Return values, such as arguments of what trains, as plain tensors; tell that they matter."""
    for x in tree_leaves(values):
        if isinstance(x, UseTrackingTensor):
            x.watch.use(x.places)
    return untraced(values)


def untraced(values: Any) -> Any:
    """Return values as plain tensors; nobody is told."""
    return tree_map(_untraced, values)


def _untraced(x: Any) -> Any:
    if not isinstance(x, UseTrackingTensor):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)
