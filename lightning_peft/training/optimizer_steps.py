"""``OptimizerSteps``: penalties and checks before each optimizer step, ``after_step`` and metrics after it."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..core.adapter import Adapter
from ..core.injection_record import active_methods, adapters_of, require_record
from ..core.method import Method
from ..core.tensor_parallel import reduce_partial_gradients


class OptimizerSteps:
    """Calls what the active methods do before and after each optimizer step."""

    def __init__(self) -> None:
        self._step, self._total_steps = 0, 0
        self._adapters: list[tuple[Method, dict[str, Adapter]]] = []  # looked up once, not at each step
        self._unchecked = set[int]()  # ids of trained parameters whose first gradient was not looked at yet
        self._sharded: list[nn.Parameter] = []

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look up adapters and trained parameters, and take over the count of steps, which a checkpoint may have set.

        From now on the model's record says that its adapters were trained.

        Raises:
            ValueError: A method cannot work in a run of so many steps.
        """
        record = require_record(module)
        record.mark_trained()
        self._adapters = [(method, adapters_of(module, method)) for method in active_methods(record)]
        self._step, total = trainer.global_step, trainer.estimated_stepping_batches
        self._total_steps = -1 if math.isinf(total) else int(total)
        for method, _ in self._adapters:
            method.check_run(self._total_steps)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._unchecked = set(map(id, trained))
        self._sharded = [parameter for parameter in trained if isinstance(parameter, DTensor)]

    def after_backward(self) -> None:
        """Sum up gradients of which tensor parallelism left a part on each process."""
        if self._sharded:
            reduce_partial_gradients(self._sharded)

    def before_step(self, module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Add the gradients of penalties.

        Raises:
            ValueError: Before the first step, a trained parameter has no gradient.
        """
        for method, adapters in self._adapters:
            penalty = method.penalty(list(adapters.values()))
            if penalty is not None:
                add_gradient(penalty, optimizer)
        if self._unchecked:
            self._unchecked -= check_gradients(module, optimizer, self._unchecked)

    def end_batch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Call the methods' ``after_step`` if the optimizer has stepped, and log their metrics."""
        if trainer.global_step == self._step:
            return  # gradients accumulate
        steps = range(self._step + 1, trainer.global_step + 1)  # one, or several where a module steps by itself
        self._step = trainer.global_step
        for method, adapters in self._adapters:
            for step in steps:
                method.after_step(list(adapters.values()), step, self._total_steps)
            if self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                module.log_dict(dict(method.metrics(adapters)), on_step=True, on_epoch=False)


def check_gradients(module: nn.Module, optimizer: Optimizer, unchecked: set[int]) -> set[int]:
    """Return the ids of those unchecked parameters that an optimizer has, now checked.

    Raises:
        ValueError: One has no gradient; names it.
    """
    checked = {id(p) for group in optimizer.param_groups for p in group["params"]} & unchecked
    names = [name for name, p in module.named_parameters() if id(p) in checked and p.grad is None and p.numel()]
    if names:
        raise ValueError(
            f"{len(names)} trained parameters got no gradient in the first step: {', '.join(names[:5])}. Their "
            f"modules do not take part in the loss; leave them out of targets or also_train. With gradient "
            f"checkpointing, use use_reentrant=False."
        )
    return checked


def add_gradient(penalty: Tensor, optimizer: Optimizer) -> None:
    """Add a penalty's gradient to those of an optimizer's parameters.

    Gradients are unscaled by then, and DDP's hooks do not run: every process computes the same penalty.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
