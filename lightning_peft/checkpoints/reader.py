"""An adapter on disk: a folder that ``save_adapter`` wrote, or a checkpoint of a run."""

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
from .adapter_state import adapter_state, check_state, clean
from .key_prefix import beginnings
from .metadata import check_format
from .save_load import fitting

KEY = "lightning_peft"  # of a Lightning checkpoint's entry


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Args:
        path: Of the file or folder.
        description: What ``describe`` wrote.
        state: Tensors by key; those of a checkpoint may be more than an adapter's.
        packed: Whether ``Adapter.pack`` made them.
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
            return fitting(model, self.state, self.path)
        names = {clean(key) for key in adapter_state(model)}
        ours, theirs = beginnings(names, self.state)
        state = {_begun(key, theirs, ours): value for key, value in self.state.items()}
        check_state(model, state, self.path)
        return {name: state[name] for name in names}


def read_stored(path: str | os.PathLike[str]) -> Stored:
    """Return the adapter in a folder or in a checkpoint.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: A file is damaged, of another format, or holds no adapter of this package.
    """
    place = Path(path)
    if place.is_file():
        return _of_checkpoint(place)
    if place.is_dir() and not (place / CONFIG).is_file() and (place / "meta.pt").is_file():
        raise ValueError(
            f"{path} is a checkpoint of which each process wrote a part; load it with its Trainer and save_adapter."
        )
    description, state = read_adapter(place)
    check_format(description, str(path))
    return Stored(str(path), description, state, packed=True)


def _of_checkpoint(path: Path) -> Stored:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is no checkpoint that can be read ({str(error).splitlines()[0]}). Give one, or the folder of "
            f"save_adapter."
        ) from error
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get(KEY), Mapping):
        raise ValueError(
            f"{path} holds no adapter of lightning_peft: it was written without PEFTStrategy, or with full_checkpoint."
        )
    check_format(checkpoint[KEY], str(path))
    state = {clean(key): value for key, value in checkpoint["state_dict"].items()}
    return Stored(str(path), dict(checkpoint[KEY]), state, packed=False)


def _begun(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key
