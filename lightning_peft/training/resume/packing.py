"""``pack`` and ``unpack``: plain data as a small tensor, which a checkpoint holds without pickled classes."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch


def pack(data: Any) -> torch.Tensor:
    """Return JSON data as bytes; states of generators that differ by little take little more than one."""
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(data).encode())), dtype=torch.uint8).clone()


def unpack(packed: torch.Tensor) -> Any:
    """Return what was packed."""
    return json.loads(zlib.decompress(packed.cpu().numpy().tobytes()))
