"""``read_header`` reads the header of a safetensors file, and checks that it describes each byte of the file once."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import IO, Any

import torch

from .read_json import MAX_JSON, parse_json

TYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I8": torch.int8,
    "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a file.

    Args:
        start: Of its bytes, from the beginning of the file.
        stop: Of its bytes.
        dtype: Data type.
        shape: Shape.
    """

    start: int
    stop: int
    dtype: torch.dtype
    shape: list[int]


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Args:
        places: Of the tensors, by name.
        metadata: Strings by name.
    """

    places: dict[str, TensorPlace]
    metadata: dict[str, str]


def read_header(file: IO[bytes], size: int, source: str) -> Header:
    """Return the header of a file of this size, which is at its beginning.

    Raises:
        ValueError: The file is cut short, has bytes that no tensor has, or a header that cannot be right.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"{source} is damaged or cut short; copy or save it again.")
    if length > MAX_JSON:
        raise ValueError(f"{source} has a header of {length:,} bytes; at most {MAX_JSON:,} are read.")
    parsed = parse_json(file.read(length), f"The header of {source}")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{source} is damaged: the metadata in its header are no strings by name.")
    places = {key: _place(key, entry, 8 + length, source) for key, entry in parsed.items()}
    _check_layout(places, 8 + length, size, source)
    return Header(places, metadata)


def with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """Return the content of a file with other metadata, in this order; the library writes them in a random one."""
    stop = 8 + int.from_bytes(content[:8], "little")
    tensors = {key: entry for key, entry in json.loads(content[8:stop]).items() if key != "__metadata__"}
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(content)[stop:]])


def _place(key: str, entry: Any, offset: int, source: str) -> TensorPlace:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            if dtype not in TYPES:
                raise ValueError(f"{source} holds {key[:100]!r} of type {dtype[:20]!r}, which cannot be read here.")
            sizes = all(type(size) is int and 0 <= size < 2**48 for size in shape) and len(shape) <= 64
            if sizes and math.prod(shape) * TYPES[dtype].itemsize == stop - start:
                return TensorPlace(offset + start, offset + stop, TYPES[dtype], shape)
    raise ValueError(f"{source} is damaged: {key[:100]!r} has no type, shape and place that fit each other.")


def _check_layout(places: dict[str, TensorPlace], offset: int, size: int, source: str) -> None:
    end = offset
    for key, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != end:
            raise ValueError(f"{source} is damaged: {key[:100]!r} begins at byte {place.start}, expected {end}.")
        end = place.stop
    if end != size:
        state = "cut short" if end > size else "followed by bytes of no tensor"
        raise ValueError(f"{source} is damaged or {state}: {size} bytes, expected {end}. Copy or save it again.")
