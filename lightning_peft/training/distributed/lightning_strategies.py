"""Lightning's own strategies: which of them adapters can live with, and what they have to be told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.tensor import DTensor

from ...checkpoints.adapter_state import frozen_names
from ...core.adapted_module import adapters
from ...core.injection_record import adapters_of, require_record
from ...core.method_groups import active_methods
from ..lightning_namespace import is_instance
from .base_consistency import check_one_base
from .fsdp1 import FSDP1Strategy
from .fsdp2 import FSDP2Strategy
from .replicated import broadcast_adapters

SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


def prepare_strategy(strategy: Strategy, full_checkpoint: bool, lr_factors: Mapping[str, float]) -> None:
    """Have DeepSpeed (ZeRO 1 and 2) write only what trains; loading it stays strict about adapters.

    DeepSpeed writes a module's ``state_dict()``, which holds no frozen base, and beside it fragments of all that is
    frozen, which are left out here.

    Args:
        strategy: A Trainer's strategy, before it has set up anything.
        full_checkpoint: Whether checkpoints hold the frozen base as well.
        lr_factors: Factors of the learning rate; a factor of 0 freezes.

    Raises:
        TypeError: The strategy would shard adapters with the base that they belong to.
        ValueError: DeepSpeed runs in a mode in which adapters would be lost.
    """
    if is_instance(strategy, FSDPStrategy) and not isinstance(strategy, FSDP1Strategy):
        raise TypeError(
            "FSDPStrategy flattens adapters together with the frozen base. Use lightning_peft.FSDP2Strategy(), or "
            "FSDP1Strategy() where FSDP2 is not at hand; both are for the Trainer of `import lightning`."
        )
    if not is_instance(strategy, DeepSpeedStrategy):
        return
    if strategy.zero_stage_3:
        raise ValueError(
            "ZeRO stage 3 takes the values out of all parameters between two steps, so that neither the base can be "
            "checked nor adapters be saved as they are. Use lightning_peft.FSDP2Strategy(), which shards the frozen "
            "base as well, or DeepSpeed with stage=2."
        )
    if frozen := [pattern for pattern, factor in lr_factors.items() if factor == 0]:
        raise ValueError(
            f"lr_factors: {frozen[0]!r} is frozen by a factor of 0, and DeepSpeed's checkpoints leave out what is "
            f"frozen. Use DDP or lightning_peft.FSDP2Strategy()."
        )
    strategy.exclude_frozen_parameters = not full_checkpoint


def start_strategy(strategy: Strategy, module: nn.Module) -> None:
    """Check at the start of fit that all processes train the same adapters over the same base.

    Raises:
        ValueError: The processes' bases differ, nobody would average gradients, or a method adds a penalty whose
            gradients DeepSpeed would not take.
    """
    if is_instance(strategy, DDPStrategy):  # DeepSpeed's is one as well
        check_one_base(module)
    if is_instance(strategy, DeepSpeedStrategy):
        _start_deepspeed(strategy, module)
    elif is_instance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        _check_averaging(strategy, module)


def start_evaluation(strategy: Strategy, module: nn.Module, within_fit: bool) -> None:
    """Check the base of each process before an evaluation of its own, as the start of fit does.

    Args:
        strategy: The Trainer's strategy.
        module: The module that is evaluated.
        within_fit: Whether this is the validation of a fit.
    """
    if is_instance(strategy, DDPStrategy) and not within_fit:
        check_one_base(module)


def ignore_base_in_ddp(module: nn.Module) -> None:
    """Let DDP send what trains, adapters whole: no frozen weights at its start, no frozen buffers before each step."""
    module.__dict__["_ddp_params_and_buffers_to_ignore"] = _FrozenNames(module)


class _FrozenNames:
    """Iterates over the names of what the frozen base of a module holds, looked up at each iteration.

    DDP asks when it wraps the module; until then more of it may be unfrozen.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __iter__(self) -> Iterator[str]:
        return iter(frozen_names(self.module))


def _start_deepspeed(strategy: DeepSpeedStrategy, module: nn.Module) -> None:
    """Send the first process's buffers of adapters to the others, which DDP does by itself and DeepSpeed does not."""
    for method in active_methods(require_record(module)):
        if method.penalty(list(adapters_of(module, method).values())) is not None:
            raise ValueError(
                f"{type(method).__name__} adds a penalty to the gradients, which DeepSpeed has put away by then. Use "
                f"DDP or lightning_peft.FSDP2Strategy()."
            )
    if strategy.world_size > 1:
        buffers = [buffer for *_, adapter in adapters(module) for buffer in adapter.buffers()]
        broadcast_adapters(buffers, strategy.root_device)


def _check_averaging(strategy: ModelParallelStrategy, module: nn.Module) -> None:
    plain = [n for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if plain and strategy.device_mesh["data_parallel"].size() > 1:
        raise ValueError(
            f"{plain[0]} trains and is not sharded, so each process would train its own: ModelParallelStrategy does "
            f"not average gradients. Call fully_shard on the whole network in configure_model, or use "
            f"lightning_peft.FSDP2Strategy()."
        )
