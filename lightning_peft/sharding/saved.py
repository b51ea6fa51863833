"""What a checkpoint holds, before anything of it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_STATE = "state_dict."


def saved_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a Lightning checkpoint on the meta device, by key.

    Args:
        path: A file, or a folder to which each process wrote its part.
    """
    if path.is_file():
        found: dict[str, Tensor] = torch.load(path, mmap=True, map_location="meta", weights_only=True)["state_dict"]
        return found
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key.removeprefix(_STATE): torch.empty(entry.size, device="meta")
        for key, entry in entries.items()
        if key.startswith(_STATE) and isinstance(entry, TensorStorageMetadata)
    }
