"""``RowStore``: rows of tensors in a temporary file; ``row_keys``: digests by which they are found again."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESERVE = 2**30  # bytes of a disk that stay free


@dataclass(frozen=True)
class RowLayout:
    """How a tensor of any number of rows lies in memory: kernels may take another path for other strides.

    Args:
        shape: Shape of one row; of the whole tensor where it holds no rows.
        by_row: Whether the first axis holds rows.
        strides: Strides of the tensor where rows are outermost, else None.
        order: The axes in the order in which they lie in memory.
        dtype: Type of the values.
        device: Device of the tensor.
    """

    shape: tuple[int, ...]
    by_row: bool
    strides: tuple[int, ...] | None
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor, rows: int) -> RowLayout:
        """Return the layout of a tensor; its first axis holds rows if it is as long as there are rows."""
        by_row = tensor.dim() > 0 and len(tensor) == rows
        strides = tensor.stride()
        if 0 in strides:  # expanded values are stored one by one
            strides = torch.empty(tensor.shape, device="meta").stride()
        order = tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
        outermost = by_row and strides[0] == max(strides)
        shape = tuple(tensor.shape[1:] if by_row else tensor.shape)
        return cls(shape, by_row, strides if outermost else None, order, tensor.dtype, tensor.device)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self, rows: int) -> Tensor:
        """Return a tensor in main memory, to be filled."""
        size = (rows, *self.shape) if self.by_row else self.shape
        if self.strides is not None:
            return torch.empty_strided(size, self.strides, dtype=self.dtype)
        return torch.empty_permuted(size, self.order, dtype=self.dtype)

    def blank(self, rows: int) -> Tensor:
        """Return a tensor whose values must not be used: not a number where the type has it, so that a use shows."""
        tensor = self.empty(rows).to(self.device)
        return tensor.fill_(torch.nan) if self.dtype.is_floating_point or self.dtype.is_complex else tensor.zero_()


class RowStore:
    """Keeps rows in a temporary file without a name, which the system removes when the process ends.

    Args:
        folder: Where; by default the system's folder for temporary files.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder or tempfile.gettempdir()
        if not os.path.isdir(self.folder):
            raise ValueError(f"cache_folder={folder!r} is no folder; create it, or leave it out.")
        self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        self.size = 0

    def close(self) -> None:
        """Close the file, which frees its space on the disk."""
        self.file.close()

    def room(self) -> int:
        """Return how many more bytes fit on the disk."""
        return shutil.disk_usage(self.folder).free - RESERVE

    def write(self, rows: Tensor) -> int:
        """Append rows, and return where they begin."""
        begin, remaining = self.size, _view(_bytes(rows))
        self.file.seek(begin)
        while len(remaining):
            remaining = remaining[self.file.write(remaining) :]
        self.size = self.file.tell()
        return begin

    def read(self, layout: RowLayout, starts: Sequence[int]) -> Tensor:
        """Return the rows that begin at these positions of the file, as one tensor.

        Args:
            layout: Layout of the tensor.
            starts: Where each row begins; one position for a tensor without rows.
        """
        tensor = layout.empty(len(starts))
        direct = tensor[:1].is_contiguous()  # then bytes are read into the tensor, else into a copy
        rows = tensor if direct else torch.empty(tensor.shape, dtype=layout.dtype)
        for row, start in zip(rows if layout.by_row else [rows], starts, strict=True):
            self.file.seek(start)
            remaining = _view(row.reshape(-1).view(torch.uint8))
            while len(remaining):
                remaining = remaining[self.file.readinto(remaining) or _raise_truncated() :]
        return (tensor if direct else tensor.copy_(rows)).to(layout.device)


def row_keys(tensors: Sequence[Tensor], rest: Any) -> tuple[int, list[bytes]]:
    """Return the number of rows, and for each row a digest of all that its outputs depend on.

    Args:
        tensors: Those with as many rows as the first enter row by row, others as a whole into each digest.
        rest: Plain data that enters each digest.
    """
    rows = next((len(x) for x in tensors if x.dim()), 0)
    common, row_bytes = hashlib.blake2b(repr(rest).encode(), digest_size=16), []
    on_host = {id(x): x.detach().cpu() for x in tensors}  # each read once: batch and arguments share tensors
    for x in tensors:
        by_row = x.dim() > 0 and len(x) == rows
        common.update(repr((by_row, x.dtype, tuple(x.shape[1:] if by_row else x.shape))).encode())
        if by_row:
            row_bytes.append(_bytes(on_host[id(x)]))
        else:
            common.update(_view(_bytes(on_host[id(x)].reshape(1, x.numel()))))
    keys = []
    for row in torch.cat(row_bytes, 1) if row_bytes else ():
        digest = common.copy()
        digest.update(_view(row))
        keys.append(digest.digest())
    return rows, keys


def _bytes(x: Tensor) -> Tensor:
    """Return a tensor's bytes: (rows, bytes)."""
    return x.detach().cpu().reshape(len(x), math.prod(x.shape[1:])).contiguous().view(torch.uint8)


def _view(x: Tensor) -> memoryview:
    return memoryview(x.view(-1).numpy())  # type: ignore[arg-type]


def _raise_truncated() -> int:
    raise RuntimeError("The file of cached rows ended early; something else has written to it.")
