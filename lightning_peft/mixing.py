"""Rows of one batch that use different adapters, while the base runs once for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Adapter, Call, WeightUpdate
from .hosts import adapters, attach, key_of, remove
from .inject import injected, named, refuse_paused, trained_by
from .layers import is_called_linear
from .switching import ROWS, passing, paused


class RowUpdates(Adapter):
    """Adds to each row of a linear layer's output what the row's own adapter adds: y_r = host(x)_r + update_n(r)(x_r).

    Args:
        host: Layer whose outputs are added to.
        parts: Updates of the same rows of the weight, by batch row; None where a row has none.
    """

    lasting = False

    def __init__(self, host: nn.Module, parts: Sequence[Sequence[WeightUpdate | None]]) -> None:
        super().__init__()
        self.parts = [_Part(updates, is_called_linear(host)) for updates in parts]

    def reset_parameters(self) -> None:
        """There are none of its own."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        x, *rest = args
        y: Tensor = inner(x, *rest, **kwargs)
        for part in self.parts:
            y = part.added(host, x, y)
        return y


class _Part:
    """What is added to some rows of a weight's output.

    Args:
        by_row: The update of each batch row.
        linear: Whether the host maps features linearly when it is called.
    """

    def __init__(self, by_row: Sequence[WeightUpdate | None], linear: bool) -> None:
        found = {id(update): update for update in by_row}
        place = {key: number for number, key in enumerate(found)}
        self.updates, self.count, self.linear = list(found.values()), len(by_row), linear
        first = next(update for update in self.updates if update is not None)
        self.rows = first.rows
        self.ids = torch.tensor([place[id(update)] for update in by_row], device=next(first.parameters()).device)

    def added(self, host: Any, x: Tensor, y: Tensor) -> Tensor:
        if len(x) % self.count:
            raise ValueError(
                f"row_adapters was given {self.count} names, and a layer has {len(x)} rows at hand, which is no "
                f"multiple; the first dimension must be that of the batch."
            )
        found = [None if update is None else update.low_rank(x) for update in self.updates]
        pairs = [None if one is None else one[1:] for one in found]
        if not self.linear or sum(map(bool, pairs)) < sum(map(bool, self.updates)):
            return self._one_by_one(host, x, y)
        for number, one in enumerate(found):
            if one is not None and one[0] is not x:  # which dropout took part of, each row's as its own adapter does
                own = (self._of_rows(x) == number).view(-1, *[1] * (x.dim() - 1))
                x = torch.where(own, one[0], x)
        return self._at_once(x, y, pairs)

    def _at_once(self, x: Tensor, y: Tensor, pairs: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor:
        """Add B_r (A_r x_r) for all rows r in two batched products."""
        a, b = (factor.to(x.dtype).index_select(0, self.ids) for factor in _stacked(pairs))
        first, stop = self.rows
        if stop - first < y.shape[-1]:
            b = F.pad(b, (0, 0, first, y.shape[-1] - stop))
        hidden = torch.bmm(x.reshape(self.count, -1, x.shape[-1]), a.mT)
        own = y.reshape(self.count, -1, y.shape[-1])
        if own.dtype == hidden.dtype == b.dtype:
            return torch.baddbmm(own, hidden, b.mT).view_as(y)
        return (own + torch.bmm(hidden, b.mT).to(y.dtype)).view_as(y)

    def _one_by_one(self, host: Any, x: Tensor, y: Tensor) -> Tensor:
        """Add one update after the other, each to its own rows."""
        ids = self._of_rows(x)
        for number, update in enumerate(self.updates):
            if update is not None:
                rows = (ids == number).nonzero()[:, 0]
                more = update.placed(host, update.update(host, x.index_select(0, rows)))
                y = y.index_add(0, rows, more.to(y.dtype))
        return y

    def _of_rows(self, x: Tensor) -> Tensor:
        return self.ids.repeat_interleave(len(x) // self.count)


def _stacked(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Return all A and all B in one tensor each, lower ranks and the base filled up with zeros: (updates, ..., ...)."""
    some = [pair for pair in pairs if pair is not None]
    rank, none = max(len(a) for a, _ in some), (some[0][0][:0], some[0][1][:, :0])
    filled = [none if pair is None else pair for pair in pairs]
    if any(len(a) < rank for a, _ in filled):
        filled = [(F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - len(a)))) for a, b in filled]
    return torch.stack([a for a, _ in filled]), torch.stack([b for _, b in filled])


@contextmanager
def row_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Context in which each row of a batch uses the adapter of its own name, in training, inference and generation.

    Equal to running each row with its adapter alone. The base runs once for all rows; updates of low rank are added in
    batched products, so that the cost grows with rows and not with adapters. Which adapters are active does not matter,
    but those that lie idle do not train: ``activate`` those that shall. A call with more rows than names takes each
    name for as many neighbours, as beams and returned sequences are. The batch is the first dimension.

    Args:
        model: A model with adapters that update weights of layers (LoRA, AdaLoRA, FedPara, KronA).
        names: The adapter's name for each row; None for the base alone.

    Raises:
        ValueError: A name is unknown, or there is none.
        TypeError: An adapter is no update of a weight, or of one that is read and never called.
        RuntimeError: Adapters are disabled, or each row has one already.
    """
    record = injected(model)
    refuse_paused(record)
    used = list(dict.fromkeys(name for name in names if name is not None))
    if isinstance(names, str) or not names:
        raise ValueError(f"row_adapters needs a list of names, one for each row of the batch, got {names!r}.")
    for name in used:
        if trained := trained_by(model, named(record, name)):
            raise TypeError(f"{name!r} trains {trained[0]} in the base itself, which all rows share.")
    plan = [(host, _by_part(found, names)) for host, found in _by_host(model, used).values()]
    with paused(model):
        try:
            for host, parts in plan:
                around = passing(host)
                attach(host, ROWS, RowUpdates(host, parts), takes_part=False)
                host.peft_order = (ROWS, *around)
            yield
        finally:
            for host, _ in plan:
                if ROWS in getattr(host, "peft", ()):
                    remove(host, ROWS)


def _by_host(model: nn.Module, used: Sequence[str]) -> dict[int, tuple[Any, dict[str, list[WeightUpdate]]]]:
    """Return hosts with the updates that each has by name."""
    found: dict[int, tuple[Any, dict[str, list[WeightUpdate]]]] = {}
    for place, host, key, adapter in adapters(model):
        for name in used:
            if key == key_of(name, adapter):
                if not isinstance(adapter, WeightUpdate) or adapter.layer.is_read:
                    raise TypeError(
                        f"{key!r} at {place} is a {type(adapter).__name__} on a {type(host).__name__}; rows can have "
                        f"adapters of their own where these update weights of layers that are called."
                    )
                found.setdefault(id(host), (host, defaultdict(list)))[1][name].append(adapter)
    return found


def _by_part(
    found: Mapping[str, Sequence[WeightUpdate]], names: Sequence[str | None]
) -> list[list[WeightUpdate | None]]:
    """Return for each part of a weight the update of each row."""
    parts: dict[tuple[int, int], dict[str, WeightUpdate]] = defaultdict(dict)
    for name, updates in found.items():
        for update in updates:
            parts[update.rows][name] = update
    return [[own.get(name) if name is not None else None for name in names] for own in parts.values()]
