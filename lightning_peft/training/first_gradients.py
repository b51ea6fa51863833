"""``FirstGradients``: reports trained parameters that had their chance and never got a gradient."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..core.adapted_module import adapters

PATIENCE = 20  # optimizer steps: layers that are dropped at random, or experts, take no part in each of them


@dataclass
class _Watched:
    """What is waited for in one optimizer: the names of parameters by their ids, and the steps that were seen."""

    waiting: dict[int, str]
    adapters: set[int]
    steps: int = 0


@dataclass
class FirstGradients:
    """Waits for the first gradient of each trained parameter, in the optimizer that holds it."""

    _names: dict[int, str] = field(default_factory=dict)
    _adapters: set[int] = field(default_factory=set)
    _watched: dict[int, _Watched] = field(default_factory=dict)  # by the id of the optimizer
    _backward_ran: bool = False
    _is_strict: bool = False

    def start(self, module: nn.Module, wrapped: nn.Module | None) -> None:
        """Begin to wait for all parameters that train.

        Args:
            module: The module.
            wrapped: What the Trainer calls in its place: DDP ends a run in which a parameter takes no part in a step,
                with a message that names none, unless it was told to find such parameters.
        """
        self._is_strict = isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters
        self._names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        self._adapters = {id(p) for *_, adapter in adapters(module) for p in adapter.parameters()}
        self._watched, self._backward_ran = {}, False

    def check_loss(self, loss: object) -> None:
        """Refuse a loss without a graph, which torch refuses by a message that names no parameter.

        Raises:
            ValueError: The loss depends on no parameter that trains.
        """
        if self._names and isinstance(loss, Tensor) and not loss.requires_grad:
            names = list(self._names.values())
            raise ValueError(
                f"The loss depends on none of the {len(names)} parameters that train: {', '.join(names[:5])}. Their "
                f"modules take no part in training_step, or it runs them under torch.no_grad() or detaches what they "
                f"return. Let targets name modules that the loss depends on."
            )

    def after_backward(self) -> None:
        """Note that there are gradients; a ``training_step`` that returns None makes none."""
        self._backward_ran = True

    def before_step(self, optimizer: Optimizer) -> None:
        """Look for first gradients; after some steps, report parameters that had none.

        Raises:
            ValueError: No adapter that the optimizer trains ever had a gradient; under DDP, some parameter had none.
        """
        if self._names:
            watched = self._watched.get(id(optimizer)) or self._watch(optimizer)
            if watched.waiting:
                self._look(optimizer, watched)

    def end(self) -> None:
        """Report what never had a gradient in a run that was too short to report it before."""
        for watched in self._watched.values():
            if watched.waiting and watched.steps:
                warnings.warn(_message(watched), stacklevel=2)
        self._names, self._watched = {}, {}

    def _watch(self, optimizer: Optimizer) -> _Watched:
        held = [id(p) for group in optimizer.param_groups for p in group["params"] if id(p) in self._names]
        waiting = {number: self._names[number] for number in held}
        watched = self._watched[id(optimizer)] = _Watched(waiting, self._adapters & waiting.keys())
        return watched

    def _look(self, optimizer: Optimizer, watched: _Watched) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        arrived = [id(p) for p in parameters if p.grad is not None]
        if not arrived and not self._backward_ran:
            return
        self._backward_ran = False
        watched.steps += 1
        for number in [*arrived, *(id(p) for p in parameters if not p.numel())]:  # FSDP1 leaves a process without any
            watched.waiting.pop(number, None)
        if watched.waiting and watched.steps == (1 if self._is_strict else PATIENCE):
            message, none_came = _message(watched), watched.adapters and watched.adapters <= watched.waiting.keys()
            watched.waiting = {}
            if none_came or self._is_strict:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)


def _message(watched: _Watched) -> str:
    names = list(watched.waiting.values())
    return (
        f"{len(names)} trained parameters got no gradient in {watched.steps} steps: {', '.join(names[:5])}. Their "
        f"modules take no part in the loss: leave them out of targets or also_train. With gradient checkpointing, use "
        f"use_reentrant=False. Under DDP, strategy='ddp_find_unused_parameters_true' allows it."
    )
