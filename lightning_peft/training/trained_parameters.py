"""``TrainedParameters``: what was declared to train, what requires gradients and what optimizers hold stay the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from torch.optim import Optimizer

from ..checkpoints.adapter_state import strip_wrapper_names
from ..core.adapted_module import active_adapters
from ..core.injection_record import require_record
from .lightning_api import torch_optimizer
from .lightning_namespace import is_instance
from .param_groups import parameters_of


class TrainedParameters:
    """Compares a module's parameters and its optimizers with what was declared to train.

    Declared are the parameters of active adapters, without those that a factor of 0 freezes, and the base parameters of
    ``also_train``; what the user unfroze before optimizers are built counts as declared as well.

    Args:
        lr_factors: Factors of the learning rate by pattern.
    """

    def __init__(self, lr_factors: Mapping[str, float]) -> None:
        self._frozen_patterns = [pattern for pattern, factor in lr_factors.items() if factor == 0]
        self._unfrozen_by_user = set[str]()
        self._group_sizes: dict[int, int] = {}  # by the id of an optimizer, when it was compared last

    def note(self, module: nn.Module) -> None:
        """Note which undeclared parameters train already, by their user's choice, before optimizers are built."""
        self._unfrozen_by_user = set()
        self._unfrozen_by_user = {name for name, _ in self._undeclared(module)}

    def check_flags(self, module: nn.Module) -> None:
        """Compare ``requires_grad`` with what was declared.

        Raises:
            ValueError: A declared parameter is frozen, or another one trains; names them.
        """
        if frozen := [name for name, p in self._declared(module).items() if not p.requires_grad]:
            raise ValueError(
                f"{_listed(frozen)} shall train and are frozen. Something froze them after PEFTStrategy chose what "
                f"trains: configure_optimizers, a hook such as on_fit_start, or a callback such as BaseFinetuning. "
                f"Leave freezing to PEFTStrategy, which freezes the base itself. To leave some out, narrow targets or "
                f"also_train, or give them a factor of 0 in lr_factors."
            )
        _check_none_unfrozen([name for name, _ in self._undeclared(module)])

    def check(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Compare ``requires_grad`` and the optimizers, if there are any, with what was declared.

        Raises:
            ValueError: They differ; names the parameters and says what to do.
        """
        self.check_flags(module)
        present = set[int]()
        for optimizer in optimizers:
            present |= self._check_optimizer(module, optimizer)
        missing = [name for name, p in self._declared(module).items() if optimizers and id(p) not in present]
        if missing:
            raise ValueError(
                f"{_listed(missing)} shall train and are in no optimizer. Something replaced the optimizers or their "
                f"param_groups after configure_optimizers; build them there, over self.parameters()."
            )

    def check_groups(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Compare an optimizer with what was declared, if its groups have other sizes than when it was compared last.

        Raises:
            ValueError: It holds a parameter that trains and was not declared.
        """
        if self._group_sizes.get(id(optimizer)) != _size(optimizer):
            self._check_optimizer(module, optimizer)

    def _check_optimizer(self, module: nn.Module, optimizer: Optimizer) -> set[int]:
        present = {id(p) for group in optimizer.param_groups for p in group["params"]}
        _check_none_unfrozen([name for name, p in self._undeclared(module) if id(p) in present])
        self._group_sizes[id(optimizer)] = _size(optimizer)
        return present

    def _declared(self, module: nn.Module) -> dict[str, nn.Parameter]:
        trained = set(require_record(module).trained) | self._unfrozen_by_user
        adapted = {id(p) for _, adapter in active_adapters(module) for p in adapter.parameters()}
        adapted -= {id(p) for pattern in self._frozen_patterns for p in parameters_of(module, pattern)}
        parameters = {strip_wrapper_names(name): p for name, p in module.named_parameters()}
        return {name: p for name, p in parameters.items() if id(p) in adapted or name in trained}

    def _undeclared(self, module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
        declared = set(map(id, self._declared(module).values()))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in declared:
                yield strip_wrapper_names(name), parameter


def optimizers_of(trainer: pl.Trainer) -> list[Optimizer]:
    """Return a Trainer's optimizers; none of DeepSpeed's, which hold parameters of their own."""
    is_deepspeed = is_instance(trainer.strategy, DeepSpeedStrategy)
    return [] if is_deepspeed else [torch_optimizer(optimizer) for optimizer in trainer.optimizers]


def _size(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} parameters ({', '.join(names[:5])}{', ...' * (len(names) > 5)})"


def _check_none_unfrozen(names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"{_listed(names)} train although PEFTStrategy froze them. Something unfroze them after injection: a hook, "
            f"or a callback such as BaseFinetuning. A checkpoint of this run would fit no other. Name them in "
            f"also_train; a scheduler or lr_factors can let them begin slowly."
        )
