"""``make_plain``: takes off a LightningModule what training put on it, once its adapters are gone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from ..checkpoints.adapter_state import drop_base, drop_missing_base_keys
from ..core.adapted_module import adapters
from ..ops.torch_api import remove_hooks
from .module_hooks import unwrap_hook

_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


def make_plain(module: Any) -> None:
    """Remove hooks, wrapped hooks and attributes that ``PEFTStrategy.apply`` put on a module."""
    for hook in ("configure_optimizers", "on_save_checkpoint", "on_load_checkpoint"):
        unwrap_hook(module, hook)
    remove_hooks(module, "state_dict", drop_base)
    remove_hooks(module, "load_state_dict_post", drop_missing_base_keys)
    module.__dict__.pop(_IGNORED_BY_DDP, None)


def check_still_adapted(module: pl.LightningModule, had_adapters: bool) -> None:
    """Raise if the adapters of a module were removed through a part of it, which knows nothing of the module.

    Raises:
        ValueError: They were.
    """
    if had_adapters and not any(adapters(module)):
        raise ValueError(
            f"The adapters of this {type(module).__name__} are gone: merge or detach was called with a part of it. "
            f"Call lightning_peft.detach(module) with the {type(module).__name__} itself as well; then it is plain."
        )
