"""``read_torch_file`` reads what ``torch.save`` wrote, as data alone, in bounded memory, with one kind of error."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..files.storage import Location, is_remote, local_path, open_file


def read_torch_file(path: Location, mmap: bool = False) -> Any:
    """Return the content of a file of ``torch.save``, on the CPU; it may hold tensors and plain data, and no code.

    Args:
        path: Path or address.
        mmap: Whether to leave tensors in the file until they are used.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds more than data, or would need more memory than its size.
    """
    with open_file(path) as opened:
        file = io.BytesIO(opened.read()) if is_remote(path) else opened
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        _check_archive(file, size, path)
    source: Any = file if is_remote(path) else local_path(path)
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap and not is_remote(path))
    except Exception as error:  # whatever a damaged pickle makes of it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain data, and is no checkpoint that can be read "
            f"({reason})."
        ) from error
    _check_tensors(content, size, path)
    return content


def _check_archive(file: Any, size: int, path: Location) -> None:
    """Refuse an archive whose content is larger than the file; torch compresses nothing."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OSError,
    ):  # torch reads older files, and says what is none
        entries = []
    file.seek(0)
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed or sum(entry.file_size for entry in entries) > size:
        raise ValueError(
            f"{path} is no file of torch.save: its content is compressed, or larger than the file of {size:,} bytes."
        )


def _check_tensors(content: Any, size: int, path: Location) -> None:
    """Refuse tensors without values, and those that would take far more memory than the file, once they are copied."""
    total = 0
    for tensor in _tensors(content):
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            kind = "no values (meta device)" if tensor.is_meta else "values that are not stored one by one"
            raise ValueError(
                f"{path} holds a tensor with {kind}; save it with the model's weights loaded, as they are."
            )
        total += tensor.numel() * tensor.element_size()
    if total > 16 * size + 2**20:  # tied weights may count several times
        raise ValueError(
            f"{path} has {size:,} bytes, and its tensors would take {total:,}; it is damaged, or no adapter."
        )


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors at the top of a content and in the dictionaries in it."""
    if isinstance(content, Mapping):
        for value in content.values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, Mapping):
                yield from (inner for inner in value.values() if isinstance(inner, Tensor))
