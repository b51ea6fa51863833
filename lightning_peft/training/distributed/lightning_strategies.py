"""Lightning's own strategies for sharding: which of them adapters can live with, and what they have to be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.tensor import DTensor

from ...core.adapted_module import adapters, disable_fast_path
from ...core.injection_record import adapters_of
from ...core.method import Method
from .fsdp1 import FSDP1Strategy
from .fsdp2 import FSDP2Strategy
from .replicated import broadcast_adapters


def prepare_strategy(strategy: Strategy, full_checkpoint: bool, lr_factors: Mapping[str, float]) -> None:
    """Have DeepSpeed (ZeRO 1 and 2) write what trains alone; loading it stays strict about adapters.

    DeepSpeed writes a module's ``state_dict()``, which holds no frozen base, and beside it fragments of all that is
    frozen, which are left out here.

    Args:
        strategy: A Trainer's, before it has set up anything.
        full_checkpoint: Whether checkpoints hold the frozen base as well.
        lr_factors: Factors of the learning rate; a factor of 0 freezes.

    Raises:
        TypeError: The strategy would shard adapters with the base that they belong to.
        ValueError: DeepSpeed runs in a mode in which adapters would be lost.
    """
    if isinstance(strategy, FSDPStrategy) and not isinstance(strategy, FSDP1Strategy):
        raise TypeError(
            "FSDPStrategy flattens adapters together with the frozen base. Use lightning_peft.FSDP2Strategy(), or "
            "FSDP1Strategy() where FSDP2 is not at hand."
        )
    if not isinstance(strategy, DeepSpeedStrategy):
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


def start_strategy(strategy: Strategy, module: nn.Module, methods: Sequence[Method]) -> None:
    """Give all processes the first one's buffers of adapters, which DeepSpeed, unlike DDP, does not send.

    Raises:
        ValueError: A method adds a penalty, whose gradients DeepSpeed would not take: it has averaged them by then. Or
            nobody would average gradients.
    """
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        _check_averaging(strategy, module)
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    for method in methods:
        if method.penalty(list(adapters_of(module, method).values())) is not None:
            raise ValueError(
                f"{type(method).__name__} adds a penalty to the gradients, which DeepSpeed has put away by then. Use "
                f"DDP or lightning_peft.FSDP2Strategy()."
            )
    if strategy.world_size > 1:
        broadcast_adapters(
            [buffer for *_, adapter in adapters(module) for buffer in adapter.buffers()], strategy.root_device
        )


def start_evaluation(strategy: Strategy, module: nn.Module) -> None:
    """Put back the hooks of torch's encoders, which DeepSpeed removes with all others before it evaluates."""
    if isinstance(strategy, DeepSpeedStrategy):
        disable_fast_path(module.modules())


def _check_averaging(strategy: ModelParallelStrategy, module: nn.Module) -> None:
    plain = [n for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if plain and strategy.device_mesh["data_parallel"].size() > 1:
        raise ValueError(
            f"{plain[0]} trains and is not sharded, so each process would train its own: ModelParallelStrategy does "
            f"not average gradients. Call fully_shard on the whole network in configure_model, or use "
            f"lightning_peft.FSDP2Strategy()."
        )
