"""``read_adapter_file`` reads an adapter from a folder of ``save_adapter`` or from a Lightning checkpoint."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter_folder import CONFIG, read_adapter
from .adapter_state import adapter_state, check_state, strip_wrapper_names
from .key_prefix import align_keys
from .metadata import check_format
from .save_load import align_state

CHECKPOINT_KEY = "lightning_peft"  # of a Lightning checkpoint's entry


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter folder or a checkpoint.

    Args:
        path: Of the file or folder.
        description: Plain data that ``adapter_metadata`` wrote.
        state: Tensors by key; those of a checkpoint may be more than an adapter's.
        packed: Whether ``Adapter.export_state`` made them.
    """

    path: str
    description: dict[str, Any]
    state: dict[str, Tensor]
    packed: bool

    def state_for(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state of the adapters and trained parameters of a model, by its own keys.

        Raises:
            ValueError: It does not fit; says how.
        """
        if self.packed:
            return align_state(model, self.state, self.path)
        names = {strip_wrapper_names(key) for key in adapter_state(model)}
        aligned = align_keys(self.state, names)
        state = {aligned.get(key, key): value for key, value in self.state.items()}
        check_state(model, state, self.path)
        return {name: state[name] for name in names}


def read_adapter_file(path: str | os.PathLike[str]) -> AdapterFile:
    """Return the adapter in a folder or in a checkpoint.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: A file is damaged, of another format, or holds no adapter of this package.
    """
    source = Path(path)
    if source.is_file():
        return _read_checkpoint(source)
    if source.is_dir() and not (source / CONFIG).is_file() and (source / "meta.pt").is_file():
        raise ValueError(
            f"{path} is a checkpoint of which each process wrote a part; load it with its Trainer and save_adapter."
        )
    description, state = read_adapter(source)
    check_format(description, str(path))
    return AdapterFile(str(path), description, state, packed=True)


def _read_checkpoint(path: Path) -> AdapterFile:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is no checkpoint that can be read ({str(error).splitlines()[0]}). Give one, or the folder of "
            f"save_adapter."
        ) from error
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get(CHECKPOINT_KEY), Mapping):
        raise ValueError(
            f"{path} holds no adapter of lightning_peft: it was written without PEFTStrategy, or with full_checkpoint."
        )
    check_format(checkpoint[CHECKPOINT_KEY], str(path))
    state = {strip_wrapper_names(key): value for key, value in checkpoint["state_dict"].items()}
    return AdapterFile(str(path), dict(checkpoint[CHECKPOINT_KEY]), state, packed=False)
