"""Folders of HF PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``, or an old ``.bin``."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..core.adapter_folder import CONFIG, WEIGHTS, replace_file, write_json

_OLD_WEIGHTS = "adapter_model.bin"


def write_peft_folder(folder: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """Write a config and tensors; files that are there are replaced only once the new ones are complete."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    weights = save(tensors, metadata={"format": "pt"})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, weights)
    write_json(folder / CONFIG, config)
    return folder


def is_peft(folder: str | os.PathLike[str]) -> bool:
    """Whether HF PEFT wrote a folder, or something like it."""
    try:
        config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "peft_type" in config


def read_peft_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of a folder that HF PEFT wrote.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or holds more than tensors.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no adapter folder of HF PEFT: {CONFIG} is missing.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({error}).") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(f"{folder / CONFIG} names no peft_type; what save_adapter wrote comes back by load_adapter.")
    return config, _tensors(folder)


def read_tensor_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a file that ``torch.save`` wrote; it may hold nothing else, so that no code can run.

    Raises:
        ValueError: The file is damaged, or holds more than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors ({error}).") from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict, but {type(state).__name__}; expected tensors by key.")
    return {str(key): value for key, value in state.items()}


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (path := folder / WEIGHTS).is_file():
        try:
            return load(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); copy it again.") from error
    if (path := folder / _OLD_WEIGHTS).is_file():
        return read_tensor_file(path)
    raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {_OLD_WEIGHTS}.")
