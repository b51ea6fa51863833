"""Finds what belongs to an adapter beside its tensors, for merged and exported folders: tokenizer, names of classes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.companion_files import COMPANIONS, companion_files
from ..checkpoints.reader import read_adapter_file
from ..files.atomic_files import replace_file
from ..files.read_json import parse_json
from ..files.storage import is_file, is_folder, joined, open_file
from ..tasks.pretrained import build_tokenizer

_CONFIG = "config.json"


def files_beside(adapter: str) -> dict[str, bytes]:
    """Return the files of the tokenizer or processor in an adapter's folder by name; a checkpoint has none."""
    files = dict[str, bytes]()
    for name in COMPANIONS if is_folder(adapter) else ():
        if is_file(joined(adapter, name)):
            with open_file(joined(adapter, name)) as file:
                files[name] = file.read()
    return files


def files_of_data(model: nn.Module, data: Any) -> dict[str, bytes]:
    """Return the files of the tokenizer that data name, or the model that they are read for; a warning without it."""
    settings: Any = getattr(model, "hparams", {})
    reference = getattr(data, "reference", None) or settings.get("model")
    try:
        own = build_tokenizer(reference) if reference and hasattr(data, "reference") else None
        return companion_files(model, own or getattr(data, "tokenizer", None))
    except (ImportError, OSError, ValueError) as error:
        warnings.warn(
            f"The tokenizer is not at hand ({type(error).__name__}: {error}), so that the folder comes without it. "
            f"Write it there by its save_pretrained.",
            stacklevel=2,
        )
        return {}


def name_merged_classes(folder: Path, adapter: str) -> None:
    """Write the names of an adapter's classes into the configuration of a merged folder, which is the base's."""
    names, path = read_adapter_file(adapter).description.get("class_names"), folder / _CONFIG
    if names and path.is_file():
        config = parse_json(path.read_bytes(), str(path))
        config |= {"id2label": {str(number): name for number, name in enumerate(names)}}
        config |= {"label2id": {name: number for number, name in enumerate(names)}}
        replace_file(path, (json.dumps(config, indent=2) + "\n").encode())
