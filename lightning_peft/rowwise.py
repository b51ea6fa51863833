"""What an adapter does to each row of a batch by itself, so that the rows of one batch can have different adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class RowWise:
    """Part of an adapter whose call falls apart in two: forward(x) = leaving(x, host(entering(x))), row by row.

    Then a host runs once for rows that have different adapters. Adapters of one form need not even run one after the
    other: any of them can stand for all, given stacked values, with ``x`` and ``y`` as (rows, tokens, features).
    """

    by_itself = False  # whether the host must run for an adapter's rows alone, inside of all others

    def row_values(self) -> tuple[Any, ...]:
        """Return what tells this form from others, then a row's matrices and vectors and, after them, numbers.

        Those of other adapters may be larger: zeros behind the last entries must change nothing. Nothing is returned
        where there is no form, so that each adapter runs by itself.
        """
        return ()

    def entering(self, host: Any, x: Tensor, *values: Any) -> Tensor:
        """Return what the host is given.

        Args:
            host: The host.
            x: Its first argument, of some rows.
            values: Matrices (rows, ..., ...), vectors (rows, 1, ...) and numbers (rows, 1, 1), or one for all; if
                there are none, the adapter takes its own.
        """
        return x

    def leaving(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        """Return what the caller is given.

        Args:
            host: The host.
            x: What ``entering`` was given.
            y: What the host returned.
            values: As for ``entering``.
        """
        return y
