"""Rows of tensors in a temporary file, found again by what they were computed from."""

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
class Form:
    """How a tensor of any number of rows lies in memory: kernels may take another path for other strides."""

    shape: tuple[int, ...]  # of one row; of all where it holds no rows
    by_row: bool
    strides: tuple[int, ...] | None  # where rows are outermost, else None
    order: tuple[int, ...]  # of the axes in memory
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor, rows: int) -> Form:
        """Return the form of a tensor, in which ``rows`` along the first axis are rows."""
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

    def absent(self, rows: int) -> Tensor:
        """Return a tensor whose values are not to be used, and ruin what uses them."""
        blank = self.empty(rows).to(self.device)
        return blank.fill_(torch.nan) if self.dtype.is_floating_point or self.dtype.is_complex else blank.zero_()


class RowStore:
    """Keeps rows in a file without a name, which is gone with the process.

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
        """Give the room on the disk back."""
        self.file.close()

    def room(self) -> int:
        """Return how many bytes more fit."""
        return shutil.disk_usage(self.folder).free - RESERVE

    def write(self, rows: Tensor) -> int:
        """Append rows; return where they begin."""
        begin, waiting = self.size, _view(_bytes(rows))
        self.file.seek(begin)
        while len(waiting):
            waiting = waiting[self.file.write(waiting) :]
        self.size = self.file.tell()
        return begin

    def read(self, form: Form, places: Sequence[int]) -> Tensor:
        """Return the rows that begin at these places, as one tensor; what is one for all begins at one place."""
        whole = form.empty(len(places))
        direct = whole[:1].is_contiguous()
        rows = whole if direct else torch.empty(whole.shape, dtype=form.dtype)
        for row, place in zip(rows if form.by_row else [rows], places, strict=True):
            self.file.seek(place)
            waiting = _view(row.reshape(-1).view(torch.uint8))
            while len(waiting):
                waiting = waiting[self.file.readinto(waiting) or _ended() :]
        return (whole if direct else whole.copy_(rows)).to(form.device)


def row_keys(tensors: Sequence[Tensor], rest: Any) -> tuple[int, list[bytes]]:
    """Return the number of rows, and for each a digest of all that belongs to it.

    Args:
        tensors: Those with as many rows as the first count by row, others as a whole, in each row's digest.
        rest: Plain data that counts for each row.
    """
    rows = next((len(x) for x in tensors if x.dim()), 0)
    common, of_rows = hashlib.blake2b(repr(rest).encode(), digest_size=16), []
    for x in tensors:
        by_row = x.dim() > 0 and len(x) == rows
        common.update(repr((by_row, x.dtype, tuple(x.shape[1:] if by_row else x.shape))).encode())
        if by_row:
            of_rows.append(_bytes(x))
        else:
            common.update(_view(_bytes(x.reshape(1, x.numel()))))
    keys = []
    for row in torch.cat(of_rows, 1) if of_rows else ():
        digest = common.copy()
        digest.update(_view(row))
        keys.append(digest.digest())
    return rows, keys


def _bytes(x: Tensor) -> Tensor:
    """Return a tensor's bytes: (rows, bytes)."""
    return x.detach().cpu().reshape(len(x), math.prod(x.shape[1:])).contiguous().view(torch.uint8)


def _view(x: Tensor) -> memoryview:
    return memoryview(x.view(-1).numpy())  # type: ignore[arg-type]


def _ended() -> int:
    raise RuntimeError("The file of cached rows ended early; something else has written to it.")
