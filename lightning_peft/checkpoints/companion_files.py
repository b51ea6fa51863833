"""``companion_files``: what travels with an adapter beside its tensors: tokenizer or processor, names of classes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..core.adapter_folder import json_bytes, read_files
from ..files.read_json import parse_json
from ..files.storage import Location, joined
from ..structure.class_names import class_names

CLASS_NAMES = "class_names"  # key of an adapter's settings, and in the file of exports
CLASS_NAMES_FILE = "class_names.json"
# What save_pretrained of tokenizers and processors writes, and the names of classes: for who copies a folder's files.
COMPANIONS = (
    CLASS_NAMES_FILE,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("preprocessor_config.json", "processor_config.json"),
)
_NAMES = ("tokenizer", "processor", "image_processor", "feature_extractor")  # of attributes that may hold one


def companion_files(model: nn.Module, tokenizer: Any = None) -> dict[str, bytes]:
    """Return the files of a tokenizer or processor by name, as ``save_pretrained`` writes them; none without one.

    Args:
        model: Module whose attribute ``tokenizer``, ``processor``, ``image_processor`` or ``feature_extractor`` is
            taken where none is given. What a ``cached_property`` has not loaded yet is not loaded for this.
        tokenizer: The tokenizer or processor.

    Raises:
        TypeError: The tokenizer that is given cannot be saved.
    """
    if tokenizer is not None and not _is_savable(tokenizer):
        raise TypeError(
            f"tokenizer must have save_pretrained, as tokenizers and processors of transformers have, got a "
            f"{type(tokenizer).__name__}."
        )
    found = tokenizer_of(model) if tokenizer is None else tokenizer
    if found is None:
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found.save_pretrained(folder)
        if any(path.is_dir() for path in folder.iterdir()):  # of several chat templates; a file has room for all
            found.save_pretrained(folder, save_jinja_files=False)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def class_names_file(model: nn.Module) -> dict[str, bytes]:
    """Return the file with the names of a classifier's classes; none where they have no names."""
    names = class_names(model)
    return {} if names is None else {CLASS_NAMES_FILE: json_bytes({CLASS_NAMES: names})}


def read_class_names(folder: Location) -> list[str]:
    """Return the names of classes in a folder's file; none where there is no file.

    Raises:
        ValueError: The file is damaged.
    """
    files = read_files(folder, (CLASS_NAMES_FILE,))
    if CLASS_NAMES_FILE not in files:
        return []
    names: Any = parse_json(files[CLASS_NAMES_FILE], joined(folder, CLASS_NAMES_FILE)).get(CLASS_NAMES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{joined(folder, CLASS_NAMES_FILE)} has no list of names. Correct it, or delete the file.")
    return names


def tokenizer_of(owner: Any) -> Any:
    """Return the tokenizer or processor that a module or its data has as an attribute, None if it has none yet."""
    for name in _NAMES:
        lazy = isinstance(getattr(type(owner), name, None), functools.cached_property)
        found = vars(owner).get(name) if lazy else getattr(owner, name, None)
        if _is_savable(found) and not isinstance(found, nn.Module):
            return found
    return None


def _is_savable(value: Any) -> bool:
    return callable(getattr(value, "save_pretrained", None))
