"""Folders of HF PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``, or an old ``.bin``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..checkpoints.torch_files import read_torch_file
from ..core.adapter_folder import CONFIG, WEIGHTS, json_bytes, parse_weights, read_files
from ..files.checksums import content_digest
from ..files.read_json import parse_json
from ..files.safetensors_header import with_metadata
from ..files.storage import Location, joined
from .check_peft_config import check_types
from .peft_format import COMMON_SETTINGS

_OLD_WEIGHTS = "adapter_model.bin"
_CHECKSUM = "lightning_peft_sha256"  # in the header of the tensors, of these and of the settings that change them


def peft_files(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the files of a folder by name, the settings last."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    metadata = {"format": "pt", _CHECKSUM: _digest(config, tensors)}
    return {WEIGHTS: with_metadata(save(tensors), metadata), CONFIG: json_bytes(config)}


def _digest(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return a checksum; settings that anybody may edit, such as the name of the base, are left out."""
    return str(content_digest({key: value for key, value in config.items() if key not in COMMON_SETTINGS}, state))


def is_peft(folder: Location) -> bool:
    """Whether HF PEFT wrote a folder, or something like it."""
    try:
        return "peft_type" in parse_json(read_files(folder, (CONFIG,))[CONFIG], str(folder))
    except (KeyError, OSError, ValueError):
        return False


def read_peft_folder(folder: Location) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of a folder that HF PEFT wrote.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or holds more than tensors.
    """
    return read_with_checksum(folder)[:2]


def read_with_checksum(folder: Location) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Return the config and the tensors of a folder, and whether they are as ``export_peft`` wrote them.

    What HF PEFT wrote has no checksum, and counts as unchanged. Who imports raises ``changed`` last, since other
    refusals say more.
    """
    files = read_files(folder, (CONFIG, WEIGHTS))
    if CONFIG not in files:
        raise FileNotFoundError(f"{folder} is no adapter folder of HF PEFT: {CONFIG} is missing.")
    config = parse_json(files[CONFIG], joined(folder, CONFIG))
    if "peft_type" not in config:
        raise ValueError(
            f"{joined(folder, CONFIG)} names no peft_type; what save_adapter wrote comes back by load_adapter."
        )
    check_types(config, joined(folder, CONFIG))
    if WEIGHTS not in files:
        return config, _old_tensors(folder), True
    state, metadata = parse_weights(files[WEIGHTS], joined(folder, WEIGHTS))
    return config, state, metadata.get(_CHECKSUM) in (None, _digest(config, state))


def changed(folder: Location) -> ValueError:
    """Return the error for files that are not as they were exported."""
    return ValueError(
        f"{joined(folder, WEIGHTS)} and {CONFIG} do not belong together, or one was changed since they were exported "
        f"(checksum); copy both again. After changes on purpose, load the adapter in HF PEFT and save it from there."
    )


def _old_tensors(folder: Location) -> dict[str, Tensor]:
    try:
        return read_tensor_file(joined(folder, _OLD_WEIGHTS))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {_OLD_WEIGHTS}.") from None


def read_tensor_file(path: Location) -> dict[str, Tensor]:
    """Return the tensors of a file that ``torch.save`` wrote; it may hold nothing else, so that no code can run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds more than tensors.
    """
    state = read_torch_file(path)
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict, but {type(state).__name__}; expected tensors by key.")
    if wrong := [key for key in state if not isinstance(key, str)]:
        raise ValueError(f"{path} holds a tensor under {type(wrong[0]).__name__}; expected names.")
    return dict(state)
