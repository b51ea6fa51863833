"""Rows of features on disk, found by the digest of what they were computed from.

Each shard is one safetensors file that is named by its content: written whole or not at all, checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ...files.atomic_files import replace_file

_DIGEST = 16  # bytes


class FeatureCache:
    """Features of one model, layer and pooling.

    Args:
        folder: Where the caches of all models are.
        about: What the features depend on beside the row; it names the cache.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        text = json.dumps(about, indent=2, sort_keys=True) + "\n"
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / "about.json", text.encode())

    def read(self, wanted: Mapping[bytes, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (numbers, features) of the wanted rows that are there, shard by shard.

        A damaged shard is removed with a warning, so that its rows count as not computed.

        Args:
            wanted: The number of each row, by its digest.
        """
        for path in sorted(self.folder.glob("*.safetensors")):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != path.stem:
                warnings.warn(f"{path} is damaged; its rows are computed again.", stacklevel=2)
                path.unlink()
                continue
            shard = load(content)
            keys = shard["digests"].numpy().tobytes()
            numbers = [wanted.get(keys[i : i + _DIGEST], -1) for i in range(0, len(keys), _DIGEST)]
            found = torch.tensor(numbers)
            if (found >= 0).any():
                yield found[found >= 0], shard["features"][found >= 0]

    def write(self, digests: Sequence[bytes], features: Tensor) -> None:
        """Add a shard."""
        keys = torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy()).view(-1, _DIGEST)
        content = save({"digests": keys, "features": features.contiguous()})
        replace_file(self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)
