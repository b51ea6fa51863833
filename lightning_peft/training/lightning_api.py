"""What this package trusts of Lightning beyond its public interface.

Whatever else of the package needs such a name takes it from here; a test says in words what a release no longer has.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from .lightning_namespace import is_instance

# Keys of a checkpoint under which the arguments of its module stand, and the entry that says what builds it of them.
SAVED_ARGUMENTS = (*CHECKPOINT_PAST_HPARAMS_KEYS, pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY)
INSTANTIATOR = "_instantiator"
OWN_INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")


def spawns_processes(trainer: pl.Trainer) -> bool:
    """Whether training runs in processes that hand no module back."""
    return is_instance(trainer.strategy.launcher, _MultiProcessingLauncher)


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the Trainer that a module is attached to; the public property raises where there is none."""
    return module._trainer


def is_compiled(module: pl.LightningModule) -> bool:
    """Whether ``torch.compile`` was applied to a module as a whole."""
    return module._compiler_ctx is not None


def torch_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer that Lightning may have wrapped."""
    return getattr(optimizer, "_optimizer", optimizer)


def saves_shards(strategy: FSDPStrategy | ModelParallelStrategy) -> bool:
    """Whether checkpoints of a sharding strategy are folders with a part of each process."""
    if isinstance(strategy, FSDPStrategy):
        return strategy._state_dict_type == "sharded"
    return strategy._save_distributed_checkpoint


def tensor_parallel_size(strategy: ModelParallelStrategy) -> Any:
    """Return over how many processes a strategy splits single layers."""
    return strategy._tensor_parallel_size
