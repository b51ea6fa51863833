"""How the factors of low-rank updates start: at random, or from the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def _kaiming(a: Tensor, b: Tensor, is_embedding: bool) -> None:
    if is_embedding:  # the factor that an index selects from starts at zero, as in the authors' code
        nn.init.zeros_(a)
        nn.init.normal_(b)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as the authors' code; the paper says Gaussian
        nn.init.zeros_(b)


def _gaussian(a: Tensor, b: Tensor, is_embedding: bool) -> None:
    random, zero = (b, a) if is_embedding else (a, b)
    nn.init.normal_(random, std=1 / len(a))
    nn.init.zeros_(zero)


@torch.no_grad()
def _orthogonal(a: Tensor, b: Tensor, is_embedding: bool) -> None:
    rank = len(a)
    basis = torch.linalg.qr(torch.randn(rank, rank, dtype=a.dtype, device=a.device)).Q
    basis_a, basis_b = basis[: (rank + 1) // 2], basis[(rank + 1) // 2 :]  # orthogonal, so that B A = 0
    inputs = torch.randn(len(basis_a), a[0].numel(), dtype=a.dtype, device=a.device)
    outputs = torch.randn(len(b), len(basis_b), dtype=b.dtype, device=b.device)
    a.copy_((basis_a.T @ inputs).view_as(a) / 10)
    b.copy_(outputs @ basis_b / 10)


def _pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


RANDOM = {"kaiming": _kaiming, "gaussian": _gaussian, "orthogonal": _orthogonal}  # fill A and B, so that B A = 0
FROM_WEIGHT = {"pissa": _pissa, "olora": _olora}  # A and B from a weight of shape (out, in), rank and scale
