"""A call whose rows have different adapters: the host runs once, what is around it for each row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.per_row import BatchableLayerAdapter


class RowAssignment:
    """The adapter of each row, by number.

    Args:
        numbers: Number of its adapter for each row, -1 for none.
        device: Where the rows are.
    """

    def __init__(self, numbers: tuple[int, ...], device: torch.device) -> None:
        self.numbers, self.device = numbers, device
        self.count, kinds = len(numbers), max(numbers) + 1
        ids = self._on_device(numbers)
        self.ids = None if kinds == 1 else ids.clamp(min=0)
        self._elsewhere = dict[torch.device, RowAssignment]()
        self._orders = dict[int, tuple[Tensor, Tensor, list[int]]]()
        self._settings = dict[tuple[Any, ...], Tensor]()
        self.has_one = (ids >= 0).view(-1, 1, 1) if -1 in numbers else None

    def on(self, device: torch.device) -> RowAssignment:
        """Return the same for another device, which a part of the model may be on."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = RowAssignment(self.numbers, device)
        return self._elsewhere[device]

    def by_adapter(self, rows: int) -> tuple[Tensor, Tensor, list[int]]:
        """Return the order of rows by adapter, those of none last, the order back, and how many each adapter has.

        In a call with more rows than names, neighbours share one.
        """
        if rows not in self._orders:
            self._orders[rows] = self._order(rows // self.count)
        return self._orders[rows]

    def _order(self, times: int) -> tuple[Tensor, Tensor, list[int]]:
        rows = self.count * times
        kinds = [*range(max(self.numbers) + 1), -1]
        order = sorted(range(rows), key=lambda row: kinds.index(self.numbers[row // times]))
        back = sorted(range(rows), key=order.__getitem__)
        sizes = [self.numbers.count(kind) * times for kind in kinds]
        return self._on_device(order), self._on_device(back), sizes

    def _on_device(self, values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
        """Return numbers as a tensor; the device is not waited for."""
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

    def _of_rows(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Return the number of each row, such as a scale, as (rows, 1, 1); copied to the device once for a context."""
        key = (dtype, *values)
        if key not in self._settings:
            self._settings[key] = self._on_device([values[number] for number in self.numbers], dtype).view(-1, 1, 1)
        return self._settings[key]

    def stacked(self, values: Sequence[Any], like: Tensor) -> Any:
        """Return the values of all rows (see ``BatchableLayerAdapter``) from those of each adapter."""
        if not isinstance(values[0], Tensor):
            return values[0] if len(set(values)) == 1 else self._of_rows(values, like.dtype)
        if len(shapes := {value.shape for value in values}) > 1:
            values = [_filled(value, [max(sides) for sides in zip(*shapes, strict=True)]) for value in values]
        if self.ids is None:
            by_row = values[0].expand(self.count, *values[0].shape)
        elif torch.is_grad_enabled():  # so that each adapter gets one gradient, not one for each row
            by_row = torch.stack(tuple(values)).index_select(0, self.ids)
        else:
            by_row = torch.stack([values[number] for number in self.numbers])  # -1 takes any
        return by_row[:, None] if by_row.dim() == 2 else by_row

    def where(self, new: Tensor, old: Tensor) -> Tensor:
        """Return ``new`` (rows, tokens, features) where rows have an adapter."""
        return new if self.has_one is None or new is old else torch.where(self.has_one, new, old)


def _stackable(examples: Sequence[tuple[Any, ...]]) -> bool:
    """Whether values of several adapters (``per_example_tensors``) have one key, by which they can be stacked."""
    return bool(examples[0]) and all(values[:1] == examples[0][:1] for values in examples)


def _filled(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a matrix or vector padded with zeros to a shape."""
    missing = [largest - size for largest, size in zip(shape, value.shape, strict=True)]
    return F.pad(value, [side for added in reversed(missing) for side in (0, added)])


class BatchedModuleCall:
    """Calls a host with another adapter for each row, of a kind that acts on the whole call, such as prompts.

    Args:
        adapters: Different adapters.
        rows: Which of them each row has.

    Raises:
        ValueError: A row has none.
    """

    def __init__(self, adapters: Sequence[Any], rows: RowAssignment) -> None:
        self.adapters, self.rows = adapters, rows
        if -1 in rows.numbers:
            raise ValueError(
                f"Row {rows.numbers.index(-1)} has no {type(adapters[0]).__name__}, and others have; all or none must."
            )

    def __call__(self, host: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        examples = [adapter.per_example_tensors() for adapter in self.adapters]
        if not _stackable(examples):
            raise ValueError(
                f"Rows can have a {type(self.adapters[0]).__name__} each where all are of one length, for one task and "
                f"without a template; here these differ or are none of that."
            )
        _, *columns = zip(*examples, strict=True)
        values = [self.rows.on(column[0].device).stacked(column, column[0]) for column in columns]
        first = self.adapters[0]
        return first.for_rows(host, inner, values, *args, **kwargs) if values else first(host, inner, *args, **kwargs)


class BatchedLayerCall:
    """Calls a layer with another adapter for each row, for one projection of the layer or all of it.

    Args:
        adapters: Different adapters.
        rows: Which of them each row has.
    """

    def __init__(self, adapters: Sequence[BatchableLayerAdapter], rows: RowAssignment) -> None:
        self.adapters, self.rows = adapters, rows
        self.is_separate = any(adapter.needs_separate_call for adapter in adapters)

    def __call__(self, host: Any, inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.rows.on(x.device)
        _check_rows(host, rows, x, x)
        if args or kwargs:
            inner = functools.partial(inner, *args, **kwargs)
        if self.is_separate:
            return self._by_itself(host, inner, rows, x)
        examples = [adapter.per_example_tensors() for adapter in self.adapters]
        if not _stackable(examples):
            return self._one_by_one(host, inner, rows, x)
        _, *columns = zip(*examples, strict=True)
        values = [rows.stacked(column, columns[0][0]) for column in columns]
        return self._at_once(host, inner, rows, x, values)

    def _at_once(
        self, host: Any, inner: Callable[..., Any], rows: RowAssignment, x: Tensor, values: Sequence[Any]
    ) -> Tensor:
        """Let the first adapter serve all rows, with the stacked values of their adapters."""
        first = self.adapters[0]
        of_rows = x.reshape(rows.count, -1, x.shape[-1])
        entering = rows.where(first.pre_forward(host, of_rows, *values), of_rows)
        y = inner(x if entering is of_rows else entering.view_as(x))
        _check_rows(host, rows, x, y)
        before = y.reshape(rows.count, -1, y.shape[-1])
        return rows.where(first.post_forward(host, of_rows, before, *values), before).view_as(y)

    def _by_itself(self, host: Any, inner: Callable[..., Any], rows: RowAssignment, x: Tensor) -> Tensor:
        """Call the host for the rows of one adapter after the other, and for those of none."""
        order, back, sizes = rows.by_adapter(x.shape[0])
        *inputs, rest = torch.split(x.index_select(0, order), sizes)
        adapters: Sequence[Any] = self.adapters
        outputs = [adapter.forward(host, inner, part) for adapter, part in zip(adapters, inputs, strict=True)]
        return torch.cat([*outputs, inner(rest)] if len(rest) else outputs).index_select(0, back)

    def _one_by_one(self, host: Any, inner: Callable[..., Any], rows: RowAssignment, x: Tensor) -> Tensor:
        """Let one adapter after the other serve its rows, with one call of the host."""
        order, back, sizes = rows.by_adapter(x.shape[0])
        inputs = torch.split(x.index_select(0, order), sizes)
        entering = [adapter.pre_forward(host, part) for adapter, part in zip(self.adapters, inputs, strict=False)]
        changed = any(new is not old for new, old in zip(entering, inputs, strict=False))
        y: Tensor = inner(_in_row_order(entering, inputs, back) if changed else x)
        _check_rows(host, rows, x, y)
        of_host = torch.split(y.index_select(0, order), sizes)
        outputs = [
            adapter.post_forward(host, *x_and_y)
            for adapter, *x_and_y in zip(self.adapters, inputs, of_host, strict=False)
        ]
        return _in_row_order(outputs, of_host, back)


def _in_row_order(new: Sequence[Tensor], old: Sequence[Tensor], back: Tensor) -> Tensor:
    """Return all rows in their order: new ones of each adapter, then old ones of rows without an adapter."""
    return torch.cat([*[rows_of_adapter.to(old[-1].dtype) for rows_of_adapter in new], old[-1]]).index_select(0, back)


def _check_rows(host: Any, rows: RowAssignment, x: Tensor, y: Any) -> None:
    """Raise where the first dimension cannot be that of the batch."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{type(host).__name__} returns a {type(y).__name__}; row_adapters needs a tensor of rows.")
    if y.shape[0] % rows.count or y.shape[0] != x.shape[0]:
        raise ValueError(
            f"row_adapters was given {rows.count} names, and a layer has {len(y)} rows at hand, which is no "
            f"multiple; the first dimension must be that of the batch."
        )
