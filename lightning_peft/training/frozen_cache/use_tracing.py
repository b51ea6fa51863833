"""``UseTrackingTensor``: an output of the frozen trunk that reports when something that trains uses its values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ...ops.torch_api import without_torch_function

OutputKey = tuple[int, int]  # number of a call of the trunk in its step, number of the tensor among what it returned

_METADATA = {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_contiguous", "is_complex"}
_METADATA |= {"__get__", "__len__", "__hash__", "__repr__", "ndimension", "nelement", "get_device", "data_ptr", "type"}


class UseWatcher(Protocol):
    """Receives the uses of tracked tensors."""

    past_trunk: bool  # whether something that trains has started: from then on, any computation is a use

    def note_use(self, outputs: Iterable[OutputKey]) -> None:
        """Note that the values of these outputs matter."""


class UseTrackingTensor(Tensor):
    """Tensor that knows which outputs of the trunk it was computed from; results computed from it know so, too.

    It reports a use to its watcher when it meets something that trains, is read as a number, or is written into another
    tensor. Shapes and types are no values, so that reading them is no use. A function that is not known is a use.
    """

    outputs: frozenset[OutputKey]
    watcher: UseWatcher

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracked = [x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)]
        with without_torch_function():
            result = func(*args, **kwargs)
        name, tensors = getattr(func, "__name__", ""), [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not tracked or _reads_no_values(name, tensors):
            return untraced(result)
        outputs, watcher = frozenset[OutputKey]().union(*(x.outputs for x in tracked)), tracked[0].watcher
        leaves_tracking = not tensors or (_writes(name, kwargs) and not isinstance(args[0], cls))
        if leaves_tracking or watcher.past_trunk or any(x.requires_grad for x in tensors):
            watcher.note_use(outputs)
            return untraced(result)
        return tree_map(lambda x: trace(x, outputs, watcher) if isinstance(x, Tensor) else x, result)


def _reads_no_values(name: str, tensors: list[Tensor]) -> bool:
    """Whether a function of this name, which returned these tensors, reads shapes and types alone."""
    return name.startswith("new_") or name.endswith("_like") or (name in _METADATA and not tensors)


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function of this name writes into its first argument, or into ``out``."""
    return name == "__setitem__" or "out" in kwargs or (name.endswith("_") and not name.endswith("__"))


def trace(tensor: Tensor, outputs: Iterable[OutputKey], watcher: UseWatcher) -> Tensor:
    """Return a tensor with the same values that knows that it was computed from these outputs."""
    if isinstance(tensor, UseTrackingTensor):  # an in-place function returns what it was given
        tensor.outputs |= frozenset(outputs)
        return tensor
    traced = tensor.as_subclass(UseTrackingTensor)
    traced.outputs, traced.watcher = frozenset(outputs), watcher
    return traced


def mark_used(values: Any) -> Any:
    """Return values, such as arguments of a module that trains, as plain tensors, and report that they are used."""
    for x in tree_leaves(values):
        if isinstance(x, UseTrackingTensor):
            x.watcher.note_use(x.outputs)
    return untraced(values)


def untraced(values: Any) -> Any:
    """Return values as plain tensors, without a report."""
    return tree_map(_untraced, values)


def _untraced(x: Any) -> Any:
    if not isinstance(x, UseTrackingTensor):
        return x
    with without_torch_function():
        return x.as_subclass(Tensor)
