"""Adapter files: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``, written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .checkpoint import adapter_state, check_state, clean, describe, restore, unpacked
from .inject import detach, injection

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the adapters and trained base parameters of a model, and what is needed to inject them again.

    Args:
        model: The very module that was given to ``inject`` (with a Trainer: the LightningModule).
        folder: Where to write; an adapter that is there is replaced only once the new one is complete.

    Returns:
        The folder.
    """
    state = {clean(k): v.detach().contiguous().cpu() for k, v in adapter_state(model, packed=True).items()}
    weights = save(state)
    config = {
        "library": "lightning_peft",
        **describe(model, packed=True),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, weights)
    _replace(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return folder


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], strict: bool = True) -> nn.Module:
    """Inject what an adapter folder says and load its values; the model is unchanged if anything is wrong.

    The adapter may come from a LightningModule and go to the bare network inside it, or the other way round.

    Args:
        model: The base model, fresh or adapted by the same methods.
        folder: What ``save_adapter`` wrote.
        strict: Whether the base must be the one that the adapter was trained on.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The folder is no adapter.
        ValueError: A file is damaged, or does not fit this model; says what and why.
    """
    config, state = read_adapter(folder)
    fresh = injection(model) is None
    try:
        restore(model, config, str(folder), strict)
        state = _aligned(state, {clean(k): v for k, v in adapter_state(model, packed=True).items()})
        state = unpacked(model, state)
        target = {clean(k): v for k, v in adapter_state(model).items()}
        check_state(model, state, str(folder))
        if extra := state.keys() - target.keys():
            raise ValueError(f"{folder} has values of {sorted(extra)[:5]}, which this model has not or does not train.")
    except Exception:
        if fresh:
            detach(model)
        raise
    with torch.no_grad():
        for key, value in state.items():
            target[key].copy_(value)
    if (record := injection(model)) is not None:
        record.fresh = False
    return model


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of an adapter folder, checked to be whole."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no adapter folder: {name} is missing. Expected what save_adapter wrote."
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({error}); save the adapter again.") from error
    if not isinstance(config, dict) or config.get("library") != "lightning_peft":
        raise ValueError(f"{folder / CONFIG} was not written by lightning_peft; another library's adapter is imported.")
    weights = (folder / WEIGHTS).read_bytes()
    try:
        state = load(weights)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or cut short ({error}); copy or save it again.") from error
    if hashlib.sha256(weights).hexdigest() != config.get("sha256"):
        raise ValueError(f"{folder / WEIGHTS} is not what {CONFIG} describes (checksum); copy both files together.")
    return config, state


def inspect_adapter(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return an adapter's description with key, shape, type and norm of each tensor, as plain data."""
    config, state = read_adapter(folder)
    tensors = [
        {"key": key, "shape": list(value.shape), "dtype": str(value.dtype), "norm": value.float().norm().item()}
        for key, value in sorted(state.items())
    ]
    return {**config, "tensors": tensors, "parameters": sum(value.numel() for value in state.values())}


def _aligned(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state under this model's names, if they differ by the name of an enclosing module alone."""
    if not state or not target or state.keys() == target.keys():
        return dict(state)
    one = next(iter(state))
    for other in target:
        if other.endswith(f".{one}"):
            renamed = {other.removesuffix(one) + k: v for k, v in state.items()}
        elif one.endswith(f".{other}"):
            prefix = one.removesuffix(other)
            renamed = {k.removeprefix(prefix) if k.startswith(prefix) else f"?{k}": v for k, v in state.items()}
        else:
            continue
        if renamed.keys() == target.keys():
            return renamed
    return dict(state)


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
