"""NF4 (NormalFloat of 4 bits) by bitsandbytes or torchao: ``library_for`` chooses one, ``store`` calls it.

Both store blocks of 64 values, and the scales of blocks in 8 bits.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.bitsandbytes_api import make_linear_4bit
from ..structure.layer_of import layer_of
from ..structure.quantized_linear import NF4Linear
from ..structure.torchao_api import to_nf4

LIBRARIES = ("bitsandbytes", "torchao")
BLOCK = 64


def store(host: Any, weight: Tensor, library: str) -> None:
    """Make a linear layer compute with a weight of shape (out, in), stored in 4 bits.

    Args:
        host: Layer with ``in_features`` and ``out_features``; changes its class.
        weight: What to store.
        library: One of ``LIBRARIES``.
    """
    if library == "bitsandbytes":
        make_linear_4bit(host, weight.float() if weight.dtype == torch.float64 else weight)
    else:
        _torchao(host, weight)


def library_for(hosts: Mapping[str, nn.Module], wanted: str | None = None) -> str:
    """Return the first library, or the one that is wanted, that runs where these layers are and stores all of them.

    Raises:
        ImportError: None is installed that runs there; says how to install them.
        ValueError: None can store all of these layers; names one.
    """
    weights: dict[str, Tensor] = {name: layer_of(host).read(host) for name, host in hosts.items()}
    devices = sorted({"cpu" if weight.is_meta else weight.device.type for weight in weights.values()})
    running = [n for n in ([wanted] if wanted else LIBRARIES) if all(_runs(n, device) for device in devices)]
    if not running:
        raise ImportError(
            f"nf4 needs {wanted or ' or '.join(LIBRARIES)}, which is not installed or does not run on "
            f"{', '.join(devices)}: pip install 'lightning-peft[quantize]'"
        )
    for library in running:
        unfit = [name for name, weight in weights.items() if not _fits(library, weight)]
        if not unfit:
            return library
    raise ValueError(
        f"{unfit[0]} of shape {tuple(weights[unfit[0]].shape)} cannot be stored by {library}, which takes blocks of "
        f"{BLOCK} values (bitsandbytes on CPU: within a row). Use another backend, int8 or other targets."
    )


def check_stores_experts(devices: Iterable[str]) -> None:
    """Raise an ``ImportError`` unless torchao, whose codes experts are stored in, runs on these devices."""
    if not all(_runs("torchao", device) for device in devices):
        raise ImportError("nf4 of experts needs torchao, which is not installed or does not run here.")


def _fits(library: str, weight: Tensor) -> bool:
    if library == "torchao":
        return weight.numel() % BLOCK == 0
    # Its kernels for CPU apply wrong scales where a block spans rows: two to four times the error, silently.
    return weight.device.type != "cpu" or weight.shape[1] % BLOCK == 0


@functools.cache
def _runs(library: str, device: str) -> bool:
    """Whether both passes through a small layer work."""
    with _quiet(), torch.enable_grad():
        try:
            host: Any = nn.Linear(64, 64, bias=False, device="meta")  # there, it draws no random number
            store(host, torch.eye(64, device=device), library)
            x = torch.ones(1, 64, device=device, requires_grad=True)
            host(x).sum().backward()
        except Exception:  # whatever it is, another library may run
            return False
    return bool(x.grad is not None and x.grad.isfinite().all())


def _torchao(host: Any, weight: Tensor) -> None:
    blocks = weight.numel() // BLOCK
    if not isinstance(host, NF4Linear):
        host.__class__ = NF4Linear
    host.encode(weight, to_nf4(weight.float(), BLOCK, math.gcd(blocks, 256)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Both libraries speak of kernels for other devices when they are imported or first called."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
