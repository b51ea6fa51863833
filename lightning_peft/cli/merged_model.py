"""``write_model`` writes a merged module as a folder that transformers, its pipelines and vLLM read as it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from ..checkpoints.safetensors_files import copy_other_files
from ..files.atomic_files import new_folder
from ..files.read_json import parse_json
from ..structure.transformers_api import from_config
from .adapter_companions import files_beside, files_of_data

_CONFIG, _STATE = "config.json", "model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def write_model(module: pl.LightningModule, target: Path, adapter: str, data: Any) -> None:
    """Write the transformers model inside a module, else the module's state as ``model.safetensors``; all or nothing.

    Of a transformers model, weights have the type that those of its base have in their files; what lies beside the
    base's weights comes from there, but for what was trained with: tokenizer, chat template and names of classes.

    Args:
        module: A module without adapters.
        target: Folder to write, which does not exist yet.
        adapter: Folder or checkpoint; a tokenizer in the folder takes the place of the base's.
        data: Whose tokenizer is written where neither has one.
    """
    from safetensors.torch import save_model

    savers = _savers(module)
    with new_folder(target) as folder:
        if len(savers) != 1:
            save_model(module, str(folder / _STATE))
            return
        network, base = savers[0], _base_folder(savers[0])
        if (dtype := _stored_type(base)) is not None:
            network.to(dtype)
        _correct_tie(network)
        network.save_pretrained(folder)
        if base is not None:
            copy_other_files(base, folder, index=False)
        has_tokenizer = any((folder / name).is_file() for name in _TOKENIZERS)
        companions = files_beside(adapter) or ({} if has_tokenizer else files_of_data(module, data))
        for name, content in companions.items():
            (folder / name).write_bytes(content)


def how_to_load(folder: Path, module: pl.LightningModule) -> list[str]:
    """Return a line of Python that loads a merged model; none where that depends on what the base's files are."""
    savers = _savers(module)
    if (folder / _CONFIG).is_file() and len(savers) == 1:
        return [f"load it:      {type(savers[0]).__name__}.from_pretrained({str(folder)!r})"]
    if len(savers) != 1 and (folder / _STATE).is_file():  # load_model knows of tensors that share memory
        return [f"load it:      safetensors.torch.load_model(module, {str(folder / _STATE)!r})"]
    return []


def _savers(module: nn.Module) -> list[Any]:
    """Return the children of a module that write themselves, as models of transformers do."""
    return [part for part in module.children() if callable(getattr(part, "save_pretrained", None))]


def _base_folder(network: nn.Module) -> Path | None:
    """Return where the files of a network's base lie on this machine, by the name that its configuration has."""
    name = from_config(network, "name_or_path")
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        from huggingface_hub import snapshot_download

        # Of the hub, only what is in the cache already, where loading the base has put what it read.
        found = Path(snapshot_download(name, local_files_only=True))
        if not any((found / file).is_file() for file in _TOKENIZERS):
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(name)  # which fetches its files into the cache
    except (ImportError, OSError, ValueError) as error:
        warnings.warn(
            f"The files of {name} are not at hand ({type(error).__name__}), so that the merged model comes without its "
            f"tokenizer: write it there by AutoTokenizer.from_pretrained({name!r}).save_pretrained(...).",
            stacklevel=2,
        )
        return None
    return found


def _stored_type(base: Path | None) -> torch.dtype | None:
    """Return the type that a base's configuration says its weights have."""
    if base is None or not (base / _CONFIG).is_file():
        return None
    config = parse_json((base / _CONFIG).read_bytes(), str(base / _CONFIG))
    nested = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    names = [part[key] for part in nested for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)]
    dtype = getattr(torch, names[0].removeprefix("torch."), None) if names else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _correct_tie(network: Any) -> None:
    """Have the configuration say whether input and output embeddings are one; else loading would overwrite one."""
    inputs, outputs = network.get_input_embeddings(), network.get_output_embeddings()
    if outputs is None or inputs is None or inputs.weight is outputs.weight:
        return
    for config in (network.config, network.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
