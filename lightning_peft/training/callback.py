"""The callback: drives methods through a Trainer's life and keeps checkpoints small. It knows no method."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from ..core.adapted_module import adapters
from ..core.fingerprint import fingerprint
from ..core.injection_record import active_methods, get_record, require_record
from ..core.method import Method
from ..core.weight_backup import check_not_merged
from ..quantization.quantize import KINDS, quantize_once
from ..structure.transformers_api import checkpoint_without_reentry
from ..summary import summary
from .distributed import prepare_strategy, start_evaluation, start_strategy
from .distributed.base_consistency import check_one_base
from .distributed.ddp import ignore_base_in_ddp
from .frozen_cache_hooks import SHARDING, CachingCallback
from .lightning_api import spawns_processes
from .lightning_checkpoint import install_checkpoint_hooks
from .module_hooks import after_build, ensure_injected, install_optimizer_hook
from .optimizer_steps import SteppingCallback
from .precision import check_precision_plugin, warn_of_narrow, widen_trained
from .print_summary import print_summary
from .rng_resume import ResumingCallback
from .train_mode import set_mode

_AVERAGING = (StochasticWeightAveraging, WeightAveraging)


class PEFTStrategy(SteppingCallback, ResumingCallback, CachingCallback):
    """Fine-tunes with one method or several, in any stage of any Trainer; checkpoints hold adapter state only.

    The base is frozen and adapted as soon as the network exists: in ``setup``, or after the module's own
    ``configure_model`` or ``setup`` where it builds its network there. What the user injected before is kept.

    Args:
        method: What to train: one method, or a list of which later ones are outer where two share a host. If not given,
            what the user injected before; of named adapters, those that are active.
        also_train: Globs or roles of base modules and parameters that train too, such as a new head.
        lr_factors: Factors of the learning rate, by method name or by glob of parameter names; they survive
            schedulers and the learning-rate finder. A factor of 0 freezes.
        no_decay: Globs of parameter names without weight decay.
        frozen_mode: ``eval``: what holds no trained parameter runs in evaluation mode while the rest trains, without
            dropout. ``train``: its dropout is active. Frozen batch norm keeps its statistics in both.
        check_base: Whether a checkpoint must have been trained on this very base.
        full_checkpoint: Whether checkpoints hold the frozen base as well.
        quantize: Stores the linear layers of the blocks in few bits before injection, one after the other: ``nf4``
            (QLoRA, https://arxiv.org/abs/2305.14314) with double quantization, or ``int8``. Norms, embeddings and the
            head keep their type.
        show_summary: Whether to print once what trains.
        cache_frozen: Whether to cache what the frozen modules return that run before anything that trains, by row, in
            the first epoch, and to skip them from then on; to the bit the same as without. Random modules are refused.
        cache_folder: Where the cache's temporary file goes; by default the system's folder for such files.

    Raises:
        ValueError: A method does not fit the model, or a trained parameter got no gradient in the first step.
    """

    def __init__(
        self,
        method: Method | list[Method] | None = None,
        also_train: list[str] | None = None,
        lr_factors: dict[str, float] | None = None,
        no_decay: list[str] | None = None,
        frozen_mode: Literal["eval", "train"] = "eval",
        check_base: bool = True,
        full_checkpoint: bool = False,
        quantize: Literal["nf4", "int8"] | None = None,
        show_summary: bool = True,
        cache_frozen: bool = False,
        cache_folder: str | None = None,
    ) -> None:
        super().__init__(cache_frozen, cache_folder)
        self.methods: Sequence[Method] = [method] if isinstance(method, Method) else list(method or ())
        if method is not None and not (self.methods and all(isinstance(m, Method) for m in self.methods)):
            raise TypeError(f"method must be a Method such as LoRA(rank=8), or a list of them, got {method!r}.")
        if frozen_mode not in ("eval", "train"):
            raise ValueError(f"frozen_mode must be 'eval' or 'train', got {frozen_mode!r}.")
        if cache_frozen and frozen_mode == "train":
            raise ValueError("cache_frozen=True needs frozen_mode='eval': in 'train', the frozen modules are random.")
        self.also_train, self.lr_factors, self.no_decay = also_train or [], lr_factors or {}, no_decay or []
        self.frozen_mode, self.check_base = frozen_mode, check_base
        if quantize not in (None, *KINDS):
            raise ValueError(f"quantize must be one of {', '.join(KINDS)} or None, got {quantize!r}.")
        self.full_checkpoint, self.show_summary, self.quantize = full_checkpoint, show_summary, quantize
        self._backend: str | None = None
        self._base: str | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Arrange for injection at the earliest moment the network exists."""
        check_precision_plugin(trainer.precision_plugin)
        shards = isinstance(trainer.strategy, SHARDING)
        self._backend = "torchao" if shards and self.quantize == "nf4" else None  # whose codes can be split
        prepare_strategy(trainer.strategy, self.full_checkpoint, self.lr_factors)
        fresh = not any(True for _ in adapters(pl_module)) and get_record(pl_module) is None
        if fresh and spawns_processes(trainer) and stage == "fit":
            raise RuntimeError(
                "A spawned process cannot hand adapters back to this one. Use strategy='ddp', or call this callback's "
                "apply(module) before fit."
            )
        averaging = [i for i, c in enumerate(trainer.callbacks) if isinstance(c, _AVERAGING)]  # type: ignore[attr-defined]
        if fresh and averaging and averaging[0] < trainer.callbacks.index(self):  # type: ignore[attr-defined]
            raise ValueError("Weight averaging copies the module in its own setup; list PEFTStrategy before it.")
        if fresh and averaging and is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # else what averaging copies next has no network
            self.apply(pl_module)
            return
        hook = next((h for h in ("configure_model", "setup") if is_overridden(h, pl_module)), None)
        if hook is None or not fresh:
            self.apply(pl_module)
        else:
            after_build(pl_module, hook, self.apply)

    def apply(self, pl_module: pl.LightningModule) -> None:
        """Adapt a module now; what ``setup`` does as soon as the network exists. Calling it again changes nothing."""
        if self.quantize is not None:
            quantize_once(pl_module, self.quantize, self._backend)
        ensure_injected(pl_module, self.methods, self.also_train)
        widen_trained(pl_module)
        if not self.full_checkpoint:
            install_checkpoint_hooks(pl_module, self.check_base)
        install_optimizer_hook(pl_module, self.lr_factors, self.no_decay)
        ignore_base_in_ddp(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what trains."""
        check_not_merged(pl_module)
        if isinstance(trainer.strategy, DDPStrategy):
            check_one_base(pl_module)
        if not any(p.requires_grad for p in pl_module.parameters()):
            raise ValueError(
                "Nothing trains: no adapter takes part. Call lightning_peft.activate(model, name) for those that shall."
            )
        warn_of_narrow(pl_module)
        if self.show_summary:
            print_summary(summary(pl_module))
        checkpoint_without_reentry(pl_module)
        start_strategy(trainer.strategy, pl_module, active_methods(require_record(pl_module)))
        self._base = fingerprint(pl_module)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put frozen modules into their mode; from now on, adapters are trained ones."""
        set_mode(pl_module, self.frozen_mode)  # a run resumed inside an epoch never starts it
        require_record(pl_module).mark_trained()
        super().on_train_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on has to know."""
        return {**super().state_dict(), "quantize": self.quantize}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned.

        Raises:
            ValueError: Training would go on over a base in other bits.
        """
        before = state_dict.get("quantize")
        if before != self.quantize:
            raise ValueError(f"The checkpoint was trained with quantize={before!r}, this run has {self.quantize!r}.")
        super().load_state_dict(state_dict)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn where adapters that nobody trained or loaded are evaluated."""
        start_evaluation(trainer.strategy, pl_module)
        if trainer.state.fn != "fit" and isinstance(trainer.strategy, DDPStrategy):
            check_one_base(pl_module)
        record = get_record(pl_module)
        if record is not None and record.untrained and not self.full_checkpoint and trainer.state.fn != "fit":
            warnings.warn("Fresh adapters are evaluated: give ckpt_path, or call load_adapter before.", stacklevel=2)

    on_test_start = on_predict_start = on_validation_start

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put frozen modules into their mode."""
        super().on_train_epoch_start(trainer, pl_module)
        checkpoint_without_reentry(pl_module)  # which may have been turned on since
        set_mode(pl_module, self.frozen_mode)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure that the base is what it was."""
        super().on_fit_end(trainer, pl_module)
        if self._base is not None and fingerprint(pl_module) != self._base:
            raise RuntimeError(
                "Frozen base weights changed during fit, so the adapter does not fit the base that it started from. "
                "Something other than the optimizer writes to them."
            )
