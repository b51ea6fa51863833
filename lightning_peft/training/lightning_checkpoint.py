"""``on_save_checkpoint``, ``on_load_checkpoint`` and ``load_from_checkpoint`` for checkpoints of adapters alone."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch

from ..checkpoints.adapter_state import (
    adapter_state,
    check_state,
    drop_base,
    drop_missing_base_keys,
    strip_wrapper_names,
)
from ..checkpoints.base_values import check_base_values
from ..checkpoints.companion_files import CLASS_NAMES
from ..checkpoints.metadata import adapter_metadata, inject_from_metadata, with_class_names
from ..checkpoints.reader import CHECKPOINT_KEY, CHECKSUM, check_checksums, check_entries, checksums
from ..checkpoints.torch_files import read_torch_file
from ..core.adapted_module import adapters
from ..core.detach_hooks import call_on_detach
from ..core.inject import detach
from ..core.injection_record import get_record
from ..core.nonfinite import warn_of_nonfinite
from ..ops.torch_api import hooks
from ..structure.class_names import set_class_names
from .injection import check_injected, ensure_injected
from .lightning_api import trainer_of
from .lightning_namespace import overrides
from .module_hooks import wrap_hook
from .plain_module import make_plain
from .saved_arguments import check_saved_arguments, leave_out_modules, take_adapters_out

_VERSION = "pytorch-lightning_version"  # a key that each checkpoint of Lightning has
_Module = TypeVar("_Module", bound=pl.LightningModule)


def install_checkpoint_hooks(module: pl.LightningModule, check_base: bool) -> None:
    """Add hooks to a module, so that its checkpoints hold what training can change, and fit it when they load.

    ``state_dict()`` leaves out the frozen base and loading does not ask for it. Heads, metrics and whatever is unfrozen
    later stay in. Within ``full_state_dict``, everything is in it.
    """
    call_on_detach(module, make_plain)
    if drop_base not in hooks(module, "state_dict").values():
        module.register_state_dict_post_hook(drop_base)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(drop_missing_base_keys)  # type: ignore[no-untyped-call]

    said = set[str]()  # what was said of saved arguments

    def save(module: pl.LightningModule, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        leave_out_modules(module, checkpoint, said)
        check_saved(module, checkpoint.get("state_dict"))
        description = with_class_names(adapter_metadata(module), module)
        checkpoint[CHECKPOINT_KEY] = {**description, CHECKSUM: checksums(description, checkpoint)}

    def load(module: pl.LightningModule, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        check_checkpoint(module, checkpoint, check_base)
        original(checkpoint)

    wrap_hook(module, "on_save_checkpoint", save)
    wrap_hook(module, "on_load_checkpoint", load)


def check_saved(module: pl.LightningModule, state: Mapping[str, Any] | None) -> None:
    """Check that a checkpoint that is about to be written holds all that trains.

    Processes after the first have an empty state where the first one writes for all; DeepSpeed writes by itself. What
    is missing is named by a ``ValueError``.
    """
    trainer = trainer_of(module)
    if state is None or (not state and trainer is not None and trainer.global_rank > 0):
        return
    present = set(map(strip_wrapper_names, state))
    missing = [key for key in map(strip_wrapper_names, adapter_state(module)) if key not in present]
    if missing:
        raise ValueError(
            f"The checkpoint would lack {len(missing)} tensors that train: {', '.join(missing[:3])}. Something takes "
            f"them out, or renames them: state_dict or on_save_checkpoint of {type(module).__name__}, or a callback's "
            f"on_save_checkpoint. Leave the state as it is; PEFTStrategy keeps the frozen base out of it."
        )


def check_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any], check_base: bool) -> None:
    """Compare a Lightning checkpoint with an adapted module, before anything of it is loaded."""
    if CHECKPOINT_KEY not in checkpoint:
        raise ValueError(
            "The checkpoint was written without PEFTStrategy and holds no adapters. Load it into the base model before "
            "training, not as ckpt_path."
        )
    check_entries(checkpoint, "The checkpoint")
    inject_from_metadata(module, checkpoint[CHECKPOINT_KEY], "The checkpoint", strict=check_base)
    if "state_dict" in checkpoint:  # strategies that load in shards have taken it out
        check_state(module, checkpoint["state_dict"], "The checkpoint")
        check_base_values(module, checkpoint["state_dict"], "The checkpoint")
        check_checksums(checkpoint, "The checkpoint")
        warn_of_nonfinite(checkpoint["state_dict"], "The checkpoint")
    set_class_names(module, checkpoint[CHECKPOINT_KEY].get(CLASS_NAMES, ()))


def warn_of_untrained(module: pl.LightningModule) -> None:
    """Warn before an evaluation of adapters that nobody trained or loaded; raise where there are none."""
    check_injected(module)
    record = get_record(module)
    if record is not None and record.untrained:
        warnings.warn("Fresh adapters are evaluated: give ckpt_path, or call load_adapter before.", stacklevel=2)


def load_from_checkpoint(
    module_class: type[_Module],
    path: str | os.PathLike[str],
    check_base: bool = True,
    weights_only: bool = True,
    **kwargs: Any,
) -> _Module:
    """Build a LightningModule and load an adapter-only checkpoint into it, without a Trainer.

    Args:
        module_class: Class of the module; it must bring the same base weights again.
        path: Checkpoint that a Trainer with PEFTStrategy wrote.
        check_base: Whether the base must be the one that was trained on.
        weights_only: Whether to refuse pickled objects, which run code when they are read. Set it to False for a file
            that you trust and that holds a network among its saved arguments.
        kwargs: For the class's own ``load_from_checkpoint``: ``map_location``, or arguments that were not saved.

    Raises:
        ValueError: The checkpoint was written without PEFTStrategy, or for another base, or names code that the program
            has not imported itself, or holds pickled objects.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> strategy = lp.PEFTStrategy(lp.LoRA(rank=2, targets=["layer"]), show_summary=False)
        >>> trainer = L.Trainer(max_steps=1, barebones=True, callbacks=[strategy], accelerator="cpu")
        >>> trainer.fit(BoringModel())
        >>> trainer.save_checkpoint("run.ckpt")
        >>> lp.active(lp.load_from_checkpoint(BoringModel, "run.ckpt", check_base=False))  # it draws its base anew
        ('lora',)
    """
    checkpoint = _read(path, weights_only)
    check_saved_arguments(checkpoint)
    take_adapters_out(checkpoint)
    without_values = {key: value for key, value in checkpoint.items() if key != CHECKPOINT_KEY} | {"state_dict": {}}
    file = io.BytesIO()
    torch.save(without_values, file)
    file.seek(0)
    with warnings.catch_warnings():  # Lightning builds the module from its saved arguments; values follow below
        warnings.filterwarnings("ignore", "(Found keys that are in the model state dict|The state dict in)")
        module = module_class.load_from_checkpoint(file, strict=False, weights_only=weights_only, **kwargs)
    inject_from_checkpoint(module, checkpoint, check_base)
    module.load_state_dict(checkpoint["state_dict"])
    return module


def _read(path: str | os.PathLike[str], weights_only: bool) -> dict[str, Any]:
    checkpoint: dict[str, Any]
    try:
        checkpoint = read_torch_file(path) if weights_only else torch.load(path, map_location="cpu", weights_only=False)
    except ValueError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise ValueError(
            f"{path} holds objects that run code when they are read, or is damaged. If "
            f"you trust it, pass weights_only=False. Checkpoints without such objects are written by a module that "
            f"calls self.save_hyperparameters(ignore=[...]) with the names of its arguments that are networks."
        ) from error
    is_lightning = isinstance(checkpoint, dict) and isinstance(checkpoint.get(_VERSION), str)
    if not is_lightning or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{os.fspath(path)} is no checkpoint of Lightning: it lacks {_VERSION} or a state_dict.")
    return checkpoint


def inject_from_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any], check_base: bool = True) -> None:
    """Inject what an adapter-only checkpoint says into a module that has no adapters yet.

    Called in a module's own ``on_load_checkpoint``, it makes the module's ``load_from_checkpoint`` read such files. A
    checkpoint that does not fit is a ``ValueError``, which says how.
    """
    fresh = CHECKPOINT_KEY in checkpoint and get_record(module) is None
    if fresh:
        check_entries(checkpoint, "The checkpoint")
        if overrides(module, "configure_model"):
            module.configure_model()
        if own := any(adapters(module)):
            ensure_injected(module, (), ())  # what the module injects itself, into a part of it
        inject_from_metadata(module, checkpoint[CHECKPOINT_KEY], "The checkpoint", strict=False)
        install_checkpoint_hooks(module, check_base)
    try:
        check_checkpoint(module, checkpoint, check_base)
    except Exception:
        if fresh and not own:
            detach(module)
        raise
