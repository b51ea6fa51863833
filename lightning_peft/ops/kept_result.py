"""``KeptResult``: what was computed from a few small tensors, kept for inference until one of them has other values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .torch_api import is_plain, is_recorded

LIMIT = 2**18  # numbers that one result may depend on; to compare more costs nearly what a product with them does
T = TypeVar("T")


class KeptResult:
    """Result of a function of tensors, for inference on the CPU.

    Their values are compared at each call, since a write through ``.data`` or a view of numpy changes no version of a
    tensor. On other devices, comparing would wait for them. Copies and files start without a result.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None  # replaced as a whole, since threads read it without a lock

    def __reduce__(self) -> tuple[type[KeptResult], tuple[()]]:
        return KeptResult, ()

    @property
    def value(self) -> Any:
        """The result that is kept; None where there is none."""
        return None if self._entry is None else self._entry.result

    def get(self, key: Hashable, inputs: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """Return ``compute()``, or what it returned before where the key and the values of all inputs are the same.

        Args:
            key: What else the result depends on.
            inputs: Tensors that it is computed from.
            compute: Function that returns a tensor, or a tuple of tensors, which nobody writes to.
        """
        if not _can_keep(inputs):
            return compute()
        entry = self._entry
        if entry is not None and entry.key == key and all(map(_same, entry.inputs, inputs)):
            return entry.result  # type: ignore[no-any-return]
        copies = [x.detach().clone() for x in inputs]  # before: what another thread writes meanwhile is noticed
        result = compute()
        made = result if isinstance(result, tuple) else (result,)
        self._entry = _Entry(key, copies, result) if all(map(is_plain, made)) else None
        return result


class _Entry(NamedTuple):
    key: Hashable
    inputs: list[Tensor]
    result: Any


def _can_keep(inputs: Sequence[Tensor]) -> bool:
    if torch.is_grad_enabled() or is_recorded() or torch.is_autocast_enabled("cpu"):
        return False
    numbers = 0
    for x in inputs:
        if x.device.type != "cpu" or not is_plain(x):
            return False
        numbers += x.numel()
    return numbers <= LIMIT


def _same(kept: Tensor, x: Tensor) -> bool:
    return kept.dtype is x.dtype and torch.equal(kept, x)
