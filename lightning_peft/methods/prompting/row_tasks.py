"""Which task each row of a batch belongs to, for adapters that hold several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class TaskAdapter(Adapter):
    """Adapter that holds one task or several, of which each row of a batch takes its own.

    Args:
        tasks: Number of tasks.
    """

    task_ids: Tensor | None = None  # (rows,), within ``row_tasks`` alone

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks

    def of_rows(self, x: Tensor, rows: int) -> Tensor:
        """Return what each row takes of (tasks, ...): (rows, ...), or all of the only task without a first axis."""
        if self.tasks == 1:
            return x[0]
        ids = self.task_ids
        if ids is None:
            raise RuntimeError(
                f"The model holds {self.tasks} tasks; say which task each row has: "
                f"with lightning_peft.row_tasks(model, ids)."
            )
        if rows % len(ids):
            raise ValueError(f"{len(ids)} task ids were given, and {rows} rows are at hand, which is no multiple.")
        repeated = ids[:, None].expand(-1, rows // len(ids)).flatten()  # beams of a row are neighbours
        return x.index_select(0, repeated)


@contextmanager
def row_tasks(model: nn.Module, ids: Tensor | int) -> Iterator[None]:
    """Context in which each row of a batch takes the adapter of its own task, in training, inference and generation.

    A call with more rows repeats each id for as many neighbours, as beams and returned sequences do. Contexts nest.

    Args:
        model: A model with an adapter that holds several tasks.
        ids: Whole numbers from 0, of shape (rows,), or one for all rows.

    Raises:
        ValueError: No adapter holds several tasks, or an id is out of range.
        TypeError: The ids are not whole numbers in one dimension.
    """
    found = [module for module in model.modules() if isinstance(module, TaskAdapter) and module.tasks > 1]
    if not found:
        raise ValueError("No adapter of the model holds several tasks; give its method tasks=2 or more.")
    given = _checked(ids, min(adapter.tasks for adapter in found))
    before = [adapter.task_ids for adapter in found]
    for adapter in found:
        adapter.task_ids = given.to(next(adapter.parameters()).device)
    try:
        yield
    finally:
        for adapter, one in zip(found, before, strict=True):
            adapter.task_ids = one


def _checked(ids: Tensor | int, tasks: int) -> Tensor:
    if isinstance(ids, int) and not isinstance(ids, bool):
        ids = torch.tensor([ids])
    if not isinstance(ids, Tensor) or ids.dtype not in _WHOLE or ids.dim() != 1:
        what = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)
        raise TypeError(f"ids must be a tensor of whole numbers of shape (rows,), or one int, got {what}.")
    if len(ids) == 0 or ids.min() < 0 or ids.max() >= tasks:
        raise ValueError(f"ids must be at least one of 0 to {tasks - 1}, the tasks of the model, got {ids.tolist()}.")
    return ids.long()
