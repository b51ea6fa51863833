"""What an adapter does to each row of a batch by itself, so that the rows of one batch can have different adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class BatchableAdapter:
    """Part of an adapter that can stand for others of its form, given the values of each row if it has some."""

    needs_separate_call = False  # whether the host must run for an adapter's rows alone, inside of all others

    def per_example_tensors(self) -> tuple[Any, ...]:
        """Return what tells this form from others, then a row's matrices and vectors and, after them, numbers.

        Nothing is returned where there is no form, so that no other adapter can stand for this one.
        """
        return ()


class BatchableModuleAdapter(BatchableAdapter, ABC):
    """Part of an adapter that surrounds calls which cannot be split by rows, with values for each row."""

    @abstractmethod
    def for_rows(self, host: Any, inner: Callable[..., Any], values: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Return what ``forward`` returns, with values (rows, ...); of more rows, neighbours have the same."""


class BatchableLayerAdapter(BatchableAdapter):
    """Part of an adapter whose call falls apart in two: forward(x) = leaving(x, host(entering(x))), row by row.

    Then a host runs once for rows that have different adapters. Adapters of one form need not even run one after the
    other: any of them can stand for all, given stacked values, with ``x`` and ``y`` as (rows, tokens, features). Values
    of other adapters of the form may be larger: zeros behind the last entries must change nothing.
    """

    def pre_forward(self, host: Any, x: Tensor, *values: Any) -> Tensor:
        """Return what the host is given.

        Args:
            host: The host.
            x: Its first argument, of some rows.
            values: Matrices (rows, ..., ...), vectors (rows, 1, ...) and numbers (rows, 1, 1), or one for all; if
                there are none, the adapter takes its own.
        """
        return x

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        """Return what the caller is given.

        Args:
            host: The host.
            x: What ``pre_forward`` was given.
            y: What the host returned.
            values: As for ``pre_forward``.
        """
        return y
