"""``TensorFiles`` reads safetensors files one tensor at a time, and replaces tensors in place.

The library of this format neither writes into a file nor tells where a tensor lies.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.read_json import MAX_JSON, parse_json
from ..files.safetensors_header import TensorPlace, read_header
from ..files.storage import Location, check_local

_CHUNK = 2**20
_INDEX = "*.safetensors.index.json"
# Files that may hold the same weights in other formats: they would be stale beside a changed copy, so none is copied.
_OTHER_FORMATS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx")


class TensorFiles:
    """Reads and writes the tensors of one file, or of all files in a folder, by key.

    Args:
        path: A file, or a folder as transformers writes it; where it has an index, the files that this names.

    Raises:
        FileNotFoundError: There is none, or one is missing that the index names.
        ValueError: A file is damaged, or no safetensors file, two hold the same tensor, the index names files of other
            folders, or the path is an address.
    """

    def __init__(self, path: Location) -> None:
        self.path = check_local(path, "weights are read from files in place")
        self.files = self._listed() if self.path.is_dir() else [self.path]
        if not self.files or not self.files[0].is_file():
            other_file = next((file.name for end in _OTHER_FORMATS for file in self.path.glob(end)), None)
            hint = "; save the base model there"
            if other_file:
                hint = f", but {other_file}: load it in transformers and write it with save_pretrained"
            raise FileNotFoundError(f"{path} holds no .safetensors file{hint}.")
        self._places: dict[str, tuple[Path, TensorPlace]] = {}
        for file in self.files:
            self._read_header(file)

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._places)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._places[key][1].shape)

    def read(self, key: str) -> Tensor:
        """Return a tensor."""
        file, place = self._places[key]
        values = torch.empty(place.shape, dtype=place.dtype)
        with file.open("rb") as opened:
            opened.seek(place.start)
            opened.readinto(_bytes_of(values))
        return values

    def write(self, key: str, values: Tensor) -> None:
        """Replace a tensor by another of its shape, rounded to its type."""
        file, place = self._places[key]
        if list(values.shape) != place.shape:
            raise ValueError(f"{key} has shape {place.shape} in {file}, and shall become {list(values.shape)}.")
        with file.open("r+b") as opened:
            opened.seek(place.start)
            opened.write(_bytes_of(values.detach().to("cpu", place.dtype).contiguous()))

    def copied(self, folder: Path) -> TensorFiles:
        """Copy the files, and those beside them in a folder but other weights, into another; holes stay holes."""
        for file in self.files:
            _copy(file, folder / file.name)
        if self.path.is_dir():
            copy_other_files(self.path, folder, index=True)
        return TensorFiles(folder if self.path.is_dir() else folder / self.path.name)

    def _listed(self) -> list[Path]:
        indexes = sorted(self.path.glob(_INDEX))
        if not indexes:
            return sorted(self.path.glob("*.safetensors"))
        files = [self.path / name for name in sorted({name for index in indexes for name in _names_in(index)})]
        if missing := next((file for file in files if not file.is_file()), None):
            raise FileNotFoundError(f"{missing} is missing, which {indexes[0].name} names; copy it there, too.")
        return files

    def _read_header(self, file: Path) -> None:
        with file.open("rb") as opened:
            places = read_header(opened, file.stat().st_size, str(file)).places
        for key, place in places.items():
            if key in self._places:
                raise ValueError(f"{file}: {key} is in {self._places[key][0].name}, too; give the file that is meant.")
            self._places[key] = (file, place)


def copy_other_files(source: Path, folder: Path, index: bool) -> None:
    """Copy what lies beside weights (configuration, tokenizer, templates) to where it is not yet, an index if asked."""
    left_out = (*_OTHER_FORMATS, "*.safetensors", *(() if index else (_INDEX,)))
    for file in source.iterdir():
        if file.is_file() and not any(map(file.match, left_out)) and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)


def _names_in(index: Path) -> set[str]:
    """Return the files that an index names; they must lie beside it, since they are copied to where it is copied."""
    if index.stat().st_size > MAX_JSON:
        raise ValueError(f"{index} has {index.stat().st_size:,} bytes; at most {MAX_JSON:,} are read.")
    try:
        weight_map = parse_json(index.read_bytes(), "its content").get("weight_map")
    except ValueError as error:
        raise ValueError(f"{index} is damaged, or no index: {error}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is damaged, or no index: its weight_map has no names of files by tensor.")
    names = set(weight_map.values())
    if outside := [name for name in sorted(names) if name in ("", ".", "..") or set(name) & set("/\\\0:")]:
        raise ValueError(f"{index} names {outside[0]!r}, which is no file beside it; nothing is read or written there.")
    return names


def _bytes_of(values: Tensor) -> memoryview:
    flat: Any = values.flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def _copy(source: Path, target: Path) -> None:
    zeros = bytes(_CHUNK)
    with source.open("rb") as old, target.open("wb") as new:
        while chunk := old.read(_CHUNK):
            if chunk == zeros[: len(chunk)]:
                new.seek(len(chunk), os.SEEK_CUR)
            else:
                new.write(chunk)
        new.truncate(source.stat().st_size)
