"""``check_updates`` calls weight updates of a program's own classes once, before anything on the model is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .adapter import Adapter
from .weight_update import WeightUpdate

_PACKAGE = __name__.partition(".")[0] + "."


def check_updates(placed: Iterable[tuple[str, nn.Module, Adapter]]) -> None:
    """Raise if what a class defines returns no tensor of the right shape, or writes into what it is given.

    The first adapter of each class alone is called, on copies, and without a draw from the generator of random numbers.
    Classes of this package are left out, whose tests do the same on every kind of layer.

    Args:
        placed: Names of hosts, hosts and their adapters.
    """
    checked = set[type]()
    for name, host, adapter in placed:
        cls = type(adapter)
        if cls.__module__.startswith(_PACKAGE) or cls in checked or not isinstance(adapter, WeightUpdate):
            continue
        checked.add(cls)
        tensors = [*host.parameters(recurse=False), *adapter.parameters(), *adapter.buffers()]
        if not any(isinstance(tensor, DTensor) for tensor in tensors):
            devices = {tensor.device for tensor in tensors if tensor.is_cuda}
            with torch.random.fork_rng(devices=devices):
                _check(name or "the root", host, adapter)


@torch.no_grad()
def _check(name: str, host: nn.Module, adapter: WeightUpdate) -> None:
    subject = type(adapter).__name__
    if type(adapter).updated is not WeightUpdate.updated:
        read: Callable[[], Any] = functools.partial(_rows_of_weight, host, adapter)
        _check_call(f"{subject}.updated", "weight", name, adapter.updated, read, adapter.shape)
    elif adapter.updates_weight:
        _check_returned(f"{subject}.delta()", name, _call(adapter.delta), adapter.shape)
    if adapter.updates_bias:
        shape = adapter.shape[:1]
        read = functools.partial(_rows_of_bias, host, adapter)
        _check_call(f"{subject}.updated_bias", "bias", name, adapter.updated_bias, read, shape)


def _rows_of_weight(host: Any, adapter: WeightUpdate) -> Tensor:
    """Return the rows of the weight in the type in which a forward gives them."""
    if adapter.layer.weight_read_by_parent:
        return adapter.rows.take(adapter.layer.read(host))
    return adapter._read_rows(host)


def _rows_of_bias(host: Any, adapter: WeightUpdate) -> Tensor | None:
    bias = adapter.layer.bias(host)
    return None if bias is None else adapter.rows.take(bias)


def _check_call(
    subject: str, argument: str, name: str, update: Callable[[Any], Any], read: Callable[[], Any], shape: Any
) -> None:
    """Call a function with a copy of what ``read`` returns."""
    value = _call(read)
    if value is _FAILED:
        return
    copy = None if value is None else value.clone()
    returned = _call(lambda: update(copy))
    if copy is not None and not _same(copy, value):
        raise ValueError(f"{subject} changed the {argument} of {name!r} in place; return a new tensor.")
    _check_returned(f"{subject}({argument})", name, returned, shape)


_FAILED = object()


def _call(function: Callable[[], Any]) -> Any:
    """Return what a function returns, or ``_FAILED``: a class may not be ready yet, and a forward raises the same."""
    try:
        return function()
    except Exception:
        return _FAILED


def _same(copy: Tensor, value: Tensor) -> bool:
    """Return whether a copy, which nothing has been written into when it was made, still has the values."""
    if not copy.is_inference() and copy._version > 0:  # tensors of the inference mode have no version
        return False
    return copy.is_meta or torch.allclose(copy, value, rtol=0, atol=0, equal_nan=True)


def _check_returned(subject: str, name: str, returned: Any, shape: Iterable[int]) -> None:
    if returned is _FAILED:
        return
    expected = f"expected a new tensor of shape {tuple(shape)}"
    if not isinstance(returned, Tensor):
        given = "None" if returned is None else f"an object of type {type(returned).__name__}"
        raise TypeError(f"{subject} returned {given} for {name!r}; {expected}.")
    if tuple(returned.shape) != tuple(shape):
        raise ValueError(f"{subject} returned a tensor of shape {tuple(returned.shape)} for {name!r}; {expected}.")
