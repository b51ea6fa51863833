"""``row_tasks``: context that tells adapters with several tasks the task of each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.scoped import Scoped
from ...ops.value_checks import is_true

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class TaskAdapter(Adapter):
    """Adapter with tensors for one task or several; each row of a batch uses those of its task.

    Args:
        tasks: Number of tasks.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.task_ids = Scoped[Tensor]()  # (rows,); set inside of ``row_tasks`` only

    def of_rows(self, x: Tensor, rows: int) -> Tensor:
        """Select from x (tasks, ...) by the task of each row: (rows, ...), or x[0] where there is one task."""
        if self.tasks == 1:
            return x[0]
        ids = self.task_ids.get()
        if ids is None:
            raise RuntimeError(
                f"The model holds {self.tasks} tasks; say which task each row has: "
                f"with lightning_peft.row_tasks(model, ids)."
            )
        if rows % len(ids):
            raise ValueError(f"{len(ids)} task ids were given; the batch has {rows} rows, which is no multiple.")
        repeated = ids[:, None].expand(-1, rows // len(ids)).flatten()  # beams of a row are neighbours
        return x.index_select(0, repeated)


@contextmanager
def row_tasks(model: nn.Module, ids: Tensor | int) -> Iterator[None]:
    """Context in which each row of a batch uses the tensors of its task, in training, inference and generation.

    In a call with a multiple of rows, each id stands for as many neighbours, as with beams and returned sequences.
    Contexts nest. The ids hold in the thread and asyncio task that enter the context, and where backward computes a
    part under gradient checkpointing again, after the context has ended, too.

    Entering waits for no device: ids that are on a GPU are checked there, so that a wrong one is the error of a later
    call, with the message in the GPU's output.

    Args:
        model: Model with an adapter that has several tasks.
        ids: Whole numbers from 0, of shape (rows,), or one for all rows.

    Raises:
        ValueError: No adapter has several tasks, or an id is out of range.
        TypeError: The ids are not whole numbers in one dimension.

    Examples:
        >>> model = nn.ModuleDict({"block": nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)})
        >>> _ = lp.inject(model, lp.PromptTuning(length=5, tasks=3, targets=["block"]))
        >>> x = torch.randn(1, 7, 16).expand(2, 7, 16)  # two equal rows
        >>> with lp.row_tasks(model, torch.tensor([0, 2])):
        ...     y = model["block"].eval()(x)
        >>> torch.equal(y[0], y[1])
        False
    """
    task_adapters = [module for module in model.modules() if isinstance(module, TaskAdapter) and module.tasks > 1]
    if not task_adapters:
        raise ValueError("No adapter of the model holds several tasks; give its method tasks=2 or more.")
    ids = _checked(ids, min(adapter.tasks for adapter in task_adapters))
    moved = {device: ids.to(device, non_blocking=True) for device in {_device_of(each) for each in task_adapters}}
    with ExitStack() as stack:
        for adapter in task_adapters:
            stack.enter_context(adapter.task_ids.during(moved[_device_of(adapter)]))
        yield


def _device_of(adapter: TaskAdapter) -> torch.device:
    return next(adapter.parameters()).device


def _checked(ids: Tensor | int, tasks: int) -> Tensor:
    """Return ids as a tensor of int64; raise if they are not ids of ``tasks`` tasks."""
    if isinstance(ids, int) and not isinstance(ids, bool):
        ids = torch.tensor([ids])
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS or ids.dim() != 1:
        described = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)
        raise TypeError(f"ids must be a tensor of whole numbers of shape (rows,), or one int, got {described}.")
    expected = f"ids must be at least one of 0 to {tasks - 1}, the tasks of the model"
    if len(ids) == 0 or not is_true(((ids >= 0) & (ids < tasks)).all(), f"{expected}, got others."):
        raise ValueError(f"{expected}, got {ids.tolist()}.")
    return ids.long()
