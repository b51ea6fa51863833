"""``PEFTStrategy``: the Lightning Callback that trains adapters; what happens at each hook of a Trainer, in order."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from ..core.detach_hooks import call_on_detach
from ..core.fingerprint import fingerprint
from ..core.method import Method, as_methods
from .distributed.base_consistency import check_base_unchanged
from .distributed.lightning_strategies import ignore_base_in_ddp, prepare_strategy, start_evaluation, start_strategy
from .frozen_cache import CachedTraining
from .injection import ensure_injected, forget_injection, inject_once_built
from .lightning_checkpoint import install_checkpoint_hooks, warn_of_untrained
from .lightning_namespace import make_callback_of_both
from .module_modes import ModuleModes, check_modes
from .optimizer_hook import install_optimizer_hook
from .optimizer_steps import OptimizerSteps
from .plain_module import make_plain
from .precision import check_precision_plugin, check_same_bits, check_trained, quantize_base, widen_trained
from .print_summary import print_summary
from .resume import ExactResume
from .trained_parameters import TrainedParameters, optimizers_of


class PEFTStrategy(Callback):
    """A Callback, despite its name: fine-tunes with one method or several; checkpoints hold adapter state only.

    The base is frozen and adapted as soon as the network exists: in ``setup``, or after the module's own
    ``configure_model`` or ``setup`` where it builds its network there. What the user injected before is kept.

    Args:
        method: What to train: one method, or a list of which later ones are outer where two share a host. If not given,
            what the user injected before, of named adapters those that are active; in evaluations, that of ckpt_path.
        also_train: Globs or roles of base modules and parameters that train too, such as a new head.
        lr_factors: Factors of the learning rate, by method name or by glob of parameter names; they survive
            schedulers and the learning-rate finder. A factor of 0 freezes.
        no_decay: Globs of parameter names without weight decay.
        frozen_mode: ``eval``: what holds no trained parameter runs in evaluation mode while the rest trains, without
            dropout. ``train``: its dropout is active. Frozen batch norm keeps its statistics in both.
        check_base: Whether a checkpoint must have been trained on this very base.
        full_checkpoint: Whether checkpoints hold the frozen base as well.
        quantize: Stores the blocks' linear layers in few bits before injection, one after the other: ``nf4`` (QLoRA,
            https://arxiv.org/abs/2305.14314) with double quantization, or ``int8``. All else keeps its type.
        show_summary: Whether to print once what trains.
        cache_frozen: Whether to cache what the frozen modules return that run before anything that trains, by row, in
            the first epoch, and to skip them from then on; to the bit the same as without. Random modules are refused.
        cache_folder: Where the cache's temporary file goes; by default the system's folder for such files.

    Raises:
        ValueError: A method does not fit the model, what was declared does not train, or no adapter gets a gradient.

    Examples:
        >>> module = L.LightningModule()
        >>> module.layer = nn.Linear(32, 2)
        >>> lp.PEFTStrategy(lp.LoRA(rank=1, targets=["layer"])).apply(module)  # as a Trainer's fit does
        >>> list(module.state_dict())  # what a checkpoint holds
        ['layer.peft.lora.a', 'layer.peft.lora.b']
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
        make_callback_of_both(type(self))
        self.methods = [] if method is None else as_methods(method)
        check_modes(frozen_mode, cache_frozen, quantize)
        self.also_train, self.lr_factors, self.no_decay = also_train or [], lr_factors or {}, no_decay or []
        self.frozen_mode, self.check_base, self.full_checkpoint = frozen_mode, check_base, full_checkpoint
        self.show_summary, self.quantize, self.cache_frozen = show_summary, quantize, cache_frozen
        self._trained = TrainedParameters(self.lr_factors)
        self._steps, self._resume, self._modes = OptimizerSteps(), ExactResume(), ModuleModes(frozen_mode)
        self.cache_folder, self._cache = cache_folder, CachedTraining(cache_frozen, cache_folder)
        self._base_fingerprint: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adapt the module at the earliest moment its network exists."""
        check_precision_plugin(trainer.precision_plugin)
        self._resume.attach(trainer, self, stage)
        prepare_strategy(trainer.strategy, self.full_checkpoint, self.lr_factors)
        inject_once_built(trainer, self, pl_module, stage, self.apply)

    def apply(self, pl_module: LightningModule) -> None:
        """Adapt a module now; what ``setup`` does as soon as the network exists. Calling it again changes nothing."""
        if self.quantize is not None:
            quantize_base(pl_module, self.quantize)
        ensure_injected(pl_module, self.methods, self.also_train, may_wait=not self.full_checkpoint)
        widen_trained(pl_module)
        if not self.full_checkpoint:
            install_checkpoint_hooks(pl_module, self.check_base)
        install_optimizer_hook(pl_module, self.lr_factors, self.no_decay, self._trained)
        call_on_detach(pl_module, make_plain)
        ignore_base_in_ddp(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what trains, show it, and restore random generators before the first data loader draws its seed."""
        check_trained(pl_module)
        start_strategy(trainer.strategy, pl_module)
        if self.show_summary:
            print_summary(pl_module)
        self._base_fingerprint = fingerprint(pl_module)
        self._resume.start_fit()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the mode of frozen modules, start counting steps, and start the cache."""
        self._modes.set(pl_module)  # here too: a run resumed inside an epoch never starts it
        self._trained.check(pl_module, optimizers_of(trainer))
        self._steps.start(trainer, pl_module)
        self._cache.start(trainer, pl_module)
        self._resume.start_training(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume.restore()
        self._cache.start_epoch()
        self._modes.set(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check what trains, once all others had their hooks at the start of an epoch; start a step of the cache."""
        if batch_idx == 0:
            self._trained.check(pl_module, optimizers_of(trainer))
        self._cache.begin(batch, trains=True)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._cache.check_first(trainer)
        self._steps.check_loss(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradients of penalties; find parameters without a gradient, and changes of the optimizer's groups."""
        self._trained.check_groups(pl_module, optimizer)
        self._steps.before_step(trainer, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """End a step of the cache, and let methods follow the optimizer's step."""
        self._cache.check_first(trainer)
        self._cache.end()
        self._steps.end_batch(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume.restore()
        self._cache.end_epoch(trainer.current_epoch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if adapters are evaluated that nobody trained or loaded."""
        start_evaluation(trainer.strategy, pl_module, within_fit := trainer.state.fn == "fit")
        if not self.full_checkpoint and not within_fit:
            warn_of_untrained(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any, **__: Any) -> None:
        self._cache.begin(batch, trains=False)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._cache.end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind of the training, and raise if the base is not what it was."""
        self._steps.report()
        self._leave()
        self._resume.end_fit()
        check_base_unchanged(pl_module, self._base_fingerprint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        forget_injection(pl_module)
        self._leave()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have an epoch that a limit cut short go on."""
        self._resume.reopen_epoch(checkpoint, checkpoint["callbacks"].get(self.state_key, {}).get("resume", {}))

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands, the counts of steps, and what the base is quantized to."""
        return {"resume": self._resume.state_dict(), **self._steps.state_dict(), "quantize": self.quantize}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from what ``state_dict`` returned; a ``ValueError`` if the base is quantized to other bits now."""
        check_same_bits(state_dict.get("quantize"), self.quantize)
        self._resume.load_state_dict(state_dict.get("resume", state_dict))
        self._steps.load_state_dict(state_dict)

    def _leave(self) -> None:
        self._cache.close()
        self._steps.end()
        self._modes.restore()
