"""Low-rank updates of an output: by torch's own operators where tokens are few, and with dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd_function import apply_function
from .dropout_mask import DroppedLowRank, draw_mask
from .factor_type import factor_type
from .fused_linear import autocast_disabled
from .parametrizations import row_norms

# The rules of this file are measured: time of forward and backward on one thread of an x86 CPU, torch 2.13, float32,
# of square layers 64, 256, 512 and 2,048 wide at 1 to 2,048 tokens and rank 8.
FLOAT_MASK = 2**15  # numbers below which dropout with a mask of floats, which has the fewest operators, is fastest
_CHUNK = 2**17  # numbers of a weight that stay in the cache of a CPU


def few_inputs(out: int, features: int) -> int:
    """Return the numbers of an input below which adding a low-rank update is cheaper than updating the weight.

    One product with the updated weight moves the weight three times more; adding the update moves the output and its
    gradient once more. They are equal at about 1,000 tokens 64 wide, 450 tokens 512 wide and 2,000 tokens 2,048 wide.
    """
    return max(2 * out * features, 2**17) * features // (out + features)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """Return x W^T + bias + scale dropout(x) A^T B^T; autograd saves x and x A^T, and the mask of dropout as floats.

    The tokens are flattened once, which each product would do, and the sum is part of the last product.
    """
    x, shape = x.flatten(0, -2), x.shape
    a, b = a.to(x.dtype), b.to(x.dtype)
    hidden = F.linear(F.dropout(x, p) if p else x, a)
    y = torch.addmm(F.linear(x, weight, bias), hidden, b.t(), alpha=scale)
    return y.view(*shape[:-1], len(weight))


def decomposed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, magnitude: Tensor, scale: float
) -> Tensor:
    """Return c (x V^T) + bias, where V = W + scale B A and c = m / ||V|| row by row; x is never multiplied with V.

    Autograd saves x, x A^T and x V^T. Where c is wider than the product, they meet in its type.
    """
    x, shape = x.flatten(0, -2), x.shape
    factor = _magnitude_over_norm(weight, a, b, magnitude, scale)
    y = low_rank_linear(x, weight, None, a, b, scale)
    if bias is not None and y.dtype == factor.dtype == bias.dtype:
        y = torch.addcmul(bias, y, factor)
    else:
        y = (y * factor if bias is None else y * factor + bias).to(y.dtype)
    return y.view(*shape[:-1], len(weight))


def _magnitude_over_norm(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """Return m / ||W + scale B A|| of each row; no gradient flows through the norm.

    On the CPU, a few rows at a time stay in its cache; the whole sum would be written to memory and read again.
    """
    one_chunk = weight.device.type != "cpu" or torch.compiler.is_compiling()
    size = len(weight) if one_chunk else max(1, _CHUNK // weight.shape[1])
    with torch.no_grad(), autocast_disabled(weight):
        chunks = zip(torch.split(weight, size), torch.split(b, size), strict=True)
        norms = [row_norms(torch.addmm(rows.to(b.dtype), factor, a, alpha=scale)) for rows, factor in chunks]
        norm = norms[0] if len(norms) == 1 else torch.cat(norms)
    return magnitude / norm


def dropped_low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    """Return scale dropout(x) A^T B^T.

    With few inputs, autograd saves what torch's dropout saves; with more, ``x`` and a mask of bytes or bits, for which
    ``p`` counts in steps of 1 / 65536.
    """
    if x.numel() < FLOAT_MASK:
        wide = factor_type(x)
        return F.linear(F.linear(F.dropout(x, p).to(wide), a.to(wide)) * scale, b.to(wide))
    kept, mask, p = draw_mask(x, p)
    with autocast_disabled(x) as dtype:
        return apply_function(DroppedLowRank, x, kept, mask, a, b, scale / (1 - p), dtype or factor_type(x))
