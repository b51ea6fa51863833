"""``BatchableLayerAdapter`` and ``BatchableModuleAdapter``: for batches whose rows have different adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class BatchableAdapter:
    """Base class of adapters that can be called in place of others of equal form, given the tensors of each row."""

    needs_separate_call = False  # whether the host must run for the rows of each adapter apart, inside of all others

    def per_example_tensors(self) -> tuple[Any, ...]:
        """Return (key, *matrices and vectors, *numbers): adapters of equal key are computed in one batched call.

        The tensors are stacked by row. An empty result means that this adapter cannot be batched with others.
        """
        return ()


class BatchableModuleAdapter(BatchableAdapter, ABC):
    """Base class of adapters around calls that cannot be split by rows, such as a whole backbone's.

    Examples:
        >>> from lightning_peft.core import BatchableModuleAdapter
        >>> class Shift(lp.Adapter, BatchableModuleAdapter):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.shift = nn.Parameter(torch.empty(features))
        ...         self.reset_parameters()
        ...
        ...     def reset_parameters(self):
        ...         nn.init.zeros_(self.shift)
        ...
        ...     def per_example_tensors(self):
        ...         return "shift", self.shift
        ...
        ...     def forward(self, host, inner, x):
        ...         return inner(x) + self.shift
        ...
        ...     def for_rows(self, host, inner, values, x):
        ...         return inner(x) + values[0][:, None]
        >>> shifts = [torch.ones(2, 8)]  # of two rows
        >>> Shift(8).for_rows(None, nn.Identity(), shifts, torch.zeros(2, 3, 8)).sum()
        tensor(48.)
    """

    @abstractmethod
    def for_rows(self, host: Any, inner: Callable[..., Any], values: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Return what ``forward`` returns, with values (rows, ...); a multiple of rows repeats each for neighbours."""


class BatchableLayerAdapter(BatchableAdapter):
    """Base class of adapters of the form post_forward(x, host(pre_forward(x))), independently for each batch row.

    One forward of the host then serves rows with different adapters. Adapters of equal key are computed together: any
    of them is called for all, given stacked values, with ``x`` and ``y`` as (rows, tokens, features). Values are padded
    to the largest adapter of the key, so zeros behind the last entries must change nothing.

    Examples:
        >>> from lightning_peft.core import BatchableLayerAdapter
        >>> class Shift(lp.Adapter, BatchableLayerAdapter):
        ...     def __init__(self, host):
        ...         super().__init__()
        ...         self.shift = nn.Parameter(torch.empty(host.out_features))
        ...         self.reset_parameters()
        ...
        ...     def reset_parameters(self):
        ...         nn.init.zeros_(self.shift)
        ...
        ...     def per_example_tensors(self):
        ...         return "shift", self.shift
        ...
        ...     def post_forward(self, host, x, y, shift=None):
        ...         return y + (self.shift if shift is None else shift)
        ...
        ...     def forward(self, host, inner, x):
        ...         return self.post_forward(host, x, inner(x))
        >>> y, shifts = torch.zeros(2, 3, 8), torch.ones(2, 1, 8)  # 2 rows of 3 tokens, and a shift for each row
        >>> Shift(nn.Linear(16, 8)).post_forward(None, None, y, shifts).sum()
        tensor(48.)
    """

    def pre_forward(self, host: Any, x: Tensor, *values: Any) -> Tensor:
        """Return the input of the host.

        Args:
            host: The host.
            x: First argument of the call.
            values: Matrices (rows, ..., ...), vectors (rows, 1, ...) and numbers (rows, 1, 1), or one number for all
                rows; without values, the adapter uses the tensors that it holds.
        """
        return x

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        """Return the output of the call.

        Args:
            host: The host.
            x: First argument of the call, before ``pre_forward``.
            y: Output of the host.
            values: As for ``pre_forward``.
        """
        return y
