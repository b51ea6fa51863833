"""``OptimizerSteps``: penalties and checks before each optimizer step, ``after_step`` and metrics after it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..core.adapter import Adapter
from ..core.injection_record import adapters_of, require_record
from ..core.method import Method
from ..core.method_groups import active_methods
from ..core.tensor_parallel import reduce_partial_gradients
from .first_gradients import FirstGradients
from .lightning_api import torch_optimizer
from .lightning_namespace import is_instance
from .training_progress import estimated_steps, expected_steps


class OptimizerSteps:
    """Calls what the active methods do before and after each step of the optimizers that hold their adapters.

    Steps are counted where torch runs them: those that a gradient scaler skips do not count, and of several optimizers
    each has a count of its own.
    """

    def __init__(self) -> None:
        self._counts: list[int] = []  # executed steps of each optimizer
        self._total = -1  # steps of the run
        self._step = 0  # Lightning's count, when metrics were logged last
        self._adapters: list[tuple[Method, dict[str, Adapter]]] = []  # looked up once, not at each step
        self._handles: list[RemovableHandle] = []
        self._is_hooked = True
        self._first_gradients = FirstGradients()
        self._sharded: list[nn.Parameter] = []

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look up adapters and trained parameters, and go on counting where a checkpoint or a former fit stopped.

        From now on the model's record says that its adapters were trained.

        Raises:
            ValueError: A method cannot work in a run of so many steps.
        """
        record = require_record(module)
        record.mark_trained()
        self._adapters = [(method, adapters_of(module, method)) for method in active_methods(record)]
        self._total = estimated_steps(trainer, module)
        for method, _ in () if getattr(trainer, "fast_dev_run", False) else self._adapters:  # of a step or so
            method.check_run(self._total)
        self._step, count = trainer.global_step, len(trainer.optimizers)
        if trainer.fit_loop.total_batch_idx < 0 or len(self._counts) != count:  # a new run, or of an earlier version
            self._counts = [self._step // max(1, count)] * count
        self._first_gradients.start(module, trainer.strategy.model)
        self._sharded = [p for p in module.parameters() if p.requires_grad and isinstance(p, DTensor)]
        self._hook(trainer, module)

    def check_loss(self, loss: Any) -> None:
        """Raise where a loss depends on nothing that trains."""
        self._first_gradients.check_loss(loss)

    def after_backward(self) -> None:
        """Sum up gradients of which tensor parallelism left a part on each process."""
        self._first_gradients.after_backward()
        if self._sharded:
            reduce_partial_gradients(self._sharded)

    def before_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Add the gradients of penalties, and look for parameters without a gradient.

        Raises:
            ValueError: No adapter has a gradient.
        """
        self._first_gradients.before_step(optimizer)
        for method, adapters in self._adapters:
            penalty = method.penalty(list(adapters.values()))
            if penalty is not None:
                add_gradient(scaled(penalty, trainer, optimizer), optimizer)

    def end_batch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the metrics of methods if an optimizer has stepped."""
        steps, self._step = trainer.global_step - self._step, trainer.global_step
        if not self._is_hooked:
            for _ in range(steps):
                self._after_step(0, self._adapters, trainer, module)
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0 with barebones=True
        if steps and interval and self._step % interval == 0:
            for method, adapters in self._adapters:
                module.log_dict(dict(method.metrics(adapters)), on_step=True, on_epoch=False)

    def end(self) -> None:
        """Take the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def report(self) -> None:
        """Report parameters that never had a gradient."""
        self._first_gradients.end()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of steps."""
        return {"steps": list(self._counts)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on counting from there; earlier versions wrote no counts."""
        self._counts = list(state_dict.get("steps", []))

    def _hook(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Have the methods called after each step; DeepSpeed steps once for each group, so batches tell there."""
        self.end()
        optimizers = [torch_optimizer(optimizer) for optimizer in trainer.optimizers]
        self._is_hooked = not is_instance(trainer.strategy, DeepSpeedStrategy)
        self._is_hooked &= all(isinstance(optimizer, Optimizer) for optimizer in optimizers)
        holder = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
        for i, optimizer in enumerate(optimizers if self._is_hooked else ()):
            held = [(m, {n: a for n, a in found.items() if _held_by(a, holder) == i}) for m, found in self._adapters]
            call = functools.partial(self._after_step, i, held, trainer, module)
            self._handles.append(optimizer.register_step_post_hook(call))

    def _after_step(
        self,
        index: int,
        held: Sequence[tuple[Method, Mapping[str, Adapter]]],
        trainer: pl.Trainer,
        module: pl.LightningModule,
        optimizer: Optimizer | None = None,
        *_: Any,
    ) -> None:
        """Call ``after_step`` of the methods whose adapters an optimizer holds, unless its kernel skipped the step."""
        if getattr(optimizer, "found_inf", None):  # of fused optimizers; others are not called by a gradient scaler
            return
        self._counts[index] += 1
        count = self._counts[index]
        total = self._total if module.automatic_optimization else expected_steps(trainer, count)
        for method, adapters in held:
            if adapters:
                method.after_step(list(adapters.values()), count, total)


def _held_by(adapter: Adapter, holder: Mapping[int, int]) -> int:
    """Return the number of the last optimizer that holds a parameter of an adapter."""
    return max((holder.get(id(parameter), 0) for parameter in adapter.parameters()), default=0)


def scaled(penalty: Tensor, trainer: pl.Trainer, optimizer: Optimizer) -> Tensor:
    """Return a penalty as gradients are still scaled before a step: only fused optimizers that were asked for unscale.

    The scale is not read, since it is on the device.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    unscales = getattr(torch_optimizer(optimizer), "_step_supports_amp_scaling", False)
    return penalty if scaler is None or not unscales else scaler.scale(penalty)


def add_gradient(penalty: Tensor, optimizer: Optimizer) -> None:
    """Add a penalty's gradient to those of an optimizer's parameters.

    DDP's hooks do not run: every process computes the same penalty.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
