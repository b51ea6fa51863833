"""The callback's part at each optimizer step: penalties before it, what methods do after it, and their metrics."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..core.adapter import Adapter
from ..core.injection_record import active_methods, adapters_of, require_record
from ..core.method import Method
from ..core.tensor_parallel import reduce_partial_gradients
from .param_groups import add_gradient, check_gradients


class SteppingCallback(pl.Callback):
    """Lets the methods whose adapters take part follow training, step by step."""

    _step, _total_steps = 0, 0
    _adapters: list[tuple[Method, dict[str, Adapter]]]  # looked up once, not at each step
    _unchecked: set[int]
    _split: list[Any]  # what trains and is no plain tensor

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the count of steps, which a checkpoint may have set."""
        self._adapters = [
            (method, adapters_of(pl_module, method)) for method in active_methods(require_record(pl_module))
        ]
        self._step, total = trainer.global_step, trainer.estimated_stepping_batches
        self._total_steps = -1 if math.isinf(total) else int(total)
        for method, _ in self._adapters:
            method.check_run(self._total_steps)
        self._unchecked = {id(p) for p in pl_module.parameters() if p.requires_grad}
        self._split = [p for p in pl_module.parameters() if p.requires_grad and isinstance(p, DTensor)]
        super().on_train_start(trainer, pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum up what tensor parallelism left in parts."""
        reduce_partial_gradients(self._split)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradients of penalties; before the first step, find parameters without one."""
        for method, found in self._adapters:
            penalty = method.penalty(list(found.values()))
            if penalty is not None:
                add_gradient(penalty, optimizer)
        if self._unchecked:
            self._unchecked -= check_gradients(pl_module, optimizer, self._unchecked)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let methods follow each optimizer step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._step:
            return  # gradients accumulate
        steps = range(self._step + 1, trainer.global_step + 1)  # one, or several where a module steps by itself
        self._step = trainer.global_step
        for method, found in self._adapters:
            for step in steps:
                method.after_step(list(found.values()), step, self._total_steps)
            if self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                pl_module.log_dict(dict(method.metrics(found)), on_step=True, on_epoch=False)
