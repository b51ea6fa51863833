"""``TensorFiles`` reads safetensors files one tensor at a time, and replaces tensors in place.

The header is parsed here, since the library of this format neither writes into a file nor tells where a tensor lies.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I8": torch.int8,
    "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
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
        ValueError: A file is no safetensors file, or two hold the same tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = self._listed() if self.path.is_dir() else [self.path]
        if not self.files or not self.files[0].is_file():
            other_file = next((file.name for end in _OTHER_FORMATS for file in self.path.glob(end)), None)
            hint = "; save the base model there"
            if other_file:
                hint = f", but {other_file}: load it in transformers and write it with save_pretrained"
            raise FileNotFoundError(f"{path} holds no .safetensors file{hint}.")
        self._places: dict[str, tuple[Path, int, torch.dtype, list[int]]] = {}
        for file in self.files:
            self._read_header(file)

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._places)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._places[key][3])

    def read(self, key: str) -> Tensor:
        """Return a tensor."""
        file, start, dtype, shape = self._places[key]
        values = torch.empty(shape, dtype=dtype)
        with file.open("rb") as opened:
            opened.seek(start)
            opened.readinto(_bytes_of(values))
        return values

    def write(self, key: str, values: Tensor) -> None:
        """Replace a tensor by another of its shape, rounded to its type."""
        file, start, dtype, shape = self._places[key]
        if list(values.shape) != shape:
            raise ValueError(f"{key} has shape {shape} in {file}, and shall become {list(values.shape)}.")
        with file.open("r+b") as opened:
            opened.seek(start)
            opened.write(_bytes_of(values.detach().to("cpu", dtype).contiguous()))

    def copied(self, folder: Path) -> TensorFiles:
        """Copy the files, and those beside them in a folder but other weights, into another; holes stay holes."""
        for file in self.files:
            _copy(file, folder / file.name)
        for file in self.path.iterdir() if self.path.is_dir() else ():
            if file.is_file() and not any(file.match(end) for end in (*_OTHER_FORMATS, "*.safetensors")):
                shutil.copy2(file, folder / file.name)
        return TensorFiles(folder if self.path.is_dir() else folder / self.path.name)

    def _listed(self) -> list[Path]:
        indexes = sorted(self.path.glob(_INDEX))
        if not indexes:
            return sorted(self.path.glob("*.safetensors"))
        try:
            names = {
                name
                for index in indexes
                for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            }
            files = [self.path / name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{indexes[0]} is damaged, or no index ({error!r}).") from error
        if missing := next((file for file in files if not file.is_file()), None):
            raise FileNotFoundError(f"{missing} is missing, which {indexes[0].name} names; copy it there, too.")
        return files

    def _read_header(self, file: Path) -> None:
        try:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length) if length < file.stat().st_size else b"")
            for key, entry in header.items():
                if key in self._places:
                    raise ValueError(f"{key} is in {self._places[key][0].name}, too; give the file that is meant")
                if key != "__metadata__":
                    start, stop = entry["data_offsets"]
                    if 8 + length + stop > file.stat().st_size:
                        raise ValueError("cut short")
                    self._places[key] = (file, 8 + length + start, _TYPES[entry["dtype"]], entry["shape"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file} is damaged, or holds types that cannot be read here ({error}).") from error


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
