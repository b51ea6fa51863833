"""``inject_once_built`` and ``ensure_injected``: when a Trainer's module is adapted, and what it may hold by then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from ..core.adapted_module import adapters
from ..core.check_keys import check_base_names
from ..core.check_placed import check_placed
from ..core.inject import inject
from ..core.injection_record import InjectionRecord, get_record, set_record
from ..core.method import Method
from ..core.weight_backup import check_not_merged
from ..structure.base_model import base_modules, base_parameters
from .lightning_api import spawns_processes, trainer_of
from .lightning_namespace import is_instance, overrides
from .module_hooks import call_after, unwrap_hook

_AVERAGING = (StochasticWeightAveraging, WeightAveraging)


def inject_once_built(
    trainer: pl.Trainer,
    callback: pl.Callback,
    module: pl.LightningModule,
    stage: str,
    apply: Callable[[pl.LightningModule], None],
) -> None:
    """Call ``apply(module)`` at the earliest moment at which the module's network exists.

    That is now, or after the module's own ``configure_model`` or ``setup`` where it builds its network there.

    Args:
        trainer: Trainer that sets the callback up.
        callback: The callback that injects.
        module: Module to adapt.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.
        apply: What injects; it may be called again.

    Raises:
        RuntimeError: Adapters would be injected in a spawned process, which cannot hand them back.
        ValueError: Weight averaging, listed before the callback, has copied a module without adapters.
    """
    if get_record(module) is not None or next(adapters(module), None) is not None:
        apply(module)
        return
    if spawns_processes(trainer) and stage == "fit":
        raise RuntimeError(
            "A spawned process cannot hand adapters back to this one. Use strategy='ddp', or call this callback's "
            "apply(module) before fit."
        )
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averaging = next((index for index, c in enumerate(callbacks) if is_instance(c, *_AVERAGING)), None)
    if averaging is not None and averaging < callbacks.index(callback):
        raise ValueError("Weight averaging copies the module in its own setup; list PEFTStrategy before it.")
    builds = overrides(module, "configure_model")
    if averaging is not None and builds:
        module.configure_model()  # else what averaging copies next has no network
    elif builds or overrides(module, "setup"):
        call_after(module, "configure_model" if builds else "setup", apply)
        return
    apply(module)


def forget_injection(module: pl.LightningModule | None) -> None:
    """Have nothing injected later where a Trainer failed before the module's network was built."""
    if module is not None:
        unwrap_hook(module, "configure_model")
        unwrap_hook(module, "setup")


def ensure_injected(
    module: pl.LightningModule, methods: Sequence[Method], also_train: Sequence[str], may_wait: bool = False
) -> None:
    """Inject methods, or take over what the user injected into this module or a module below it.

    Args:
        module: The module.
        methods: What to inject; nothing, if something was injected.
        also_train: Patterns of base parameters that train, too.
        may_wait: Whether an evaluation without methods may take them from its checkpoint, once that is loaded.

    Raises:
        TypeError: The module is sharded already.
        ValueError: Something else was injected, or no method is given and nothing was.
        RuntimeError: Adapters below are merged into the weights.
    """
    record = get_record(module)
    if record is None:
        below = [inner for part in module.modules() if (inner := get_record(part)) is not None]
        if not below:
            if may_wait and not methods and _evaluates(module):
                return  # hooks inject what the checkpoint says; check_injected tells where there was none
            _check_injectable(module, methods)
            inject(module, methods, also_train)
            return
        check_not_merged(module)
        record = InjectionRecord.around(below, base_parameters(module))
        check_base_names(base_modules(module), [method.name for method in record.methods])
        set_record(module, record)
    check_placed(module)
    if methods and record.methods not in (list(methods), [method.finalized() for method in methods]):
        raise ValueError(
            f"The model holds {record.methods}, PEFTStrategy was given {list(methods)}. Pass the same methods, or call "
            f"lightning_peft.detach(model) first."
        )


def check_injected(module: pl.LightningModule) -> None:
    """Raise where an evaluation without a method starts, and no checkpoint brought one."""
    if get_record(module) is None:
        raise ValueError(
            "PEFTStrategy without a method evaluates what a checkpoint or the module brings, and nothing was injected: "
            "give the Trainer ckpt_path, PEFTStrategy a method, or call lightning_peft.load_adapter first."
        )


def _evaluates(module: pl.LightningModule) -> bool:
    """Whether a module is set up for an evaluation whose checkpoint is loaded before the strategy wraps the module."""
    trainer = trainer_of(module)
    if trainer is None or trainer.state.fn not in (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING):
        return False
    return not trainer.strategy.restore_checkpoint_after_setup


def _check_injectable(module: pl.LightningModule, methods: Sequence[Method]) -> None:
    """Raise where there is nothing to inject, or where every process would draw adapters of its own."""
    if not methods:
        raise ValueError(
            "PEFTStrategy without a method trains what was injected before, and nothing was: give it a method, or "
            "call lightning_peft.inject, or add_adapter and activate, first."
        )
    if any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in module.modules()):
        raise TypeError(
            "The model is sharded and has no adapters yet; each rank would train its own. Call "
            "lightning_peft.inject(self, method) in configure_model, before fully_shard."
        )
