"""Low-rank updates of an output: by torch's own operators where tokens are few, and with dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd_function import apply_function
from .dropout_mask import DroppedLowRank, draw_mask
from .factor_type import factor_type, one_type
from .fused_linear import TINY_WEIGHT, autocast_disabled
from .parametrizations import magnitude_over_norm, row_norms
from .torch_api import element_count

# The rules of this file are measured: time of forward and backward on one thread of an x86 CPU, torch 2.13, float32,
# of square layers 64, 256, 512 and 2,048 wide at 1 to 2,048 tokens and rank 8.
FLOAT_MASK = 2**17  # numbers below which packing the mask of dropout takes longer than it saves
_CHUNK = 2**17  # numbers of a weight that stay in the cache of a CPU


def few_inputs(out: int, features: int) -> int:
    """Return the numbers of an input below which adding a low-rank update is cheaper than updating the weight.

    One product with the updated weight moves the weight three times more; adding the update moves the output and its
    gradient once more. They are equal at about 1,000 tokens 64 wide, 450 tokens 512 wide and 2,000 tokens 2,048 wide.
    """
    return max(2 * out * features, 2**17) * features // (out + features)


def kept_inputs(out: int, features: int) -> int:
    """Return the numbers of an input from which, without gradients, a product with a kept updated weight is cheaper.

    To notice that the weight has changed takes a product of the base's weight with a vector, and about 20 operators
    and comparisons. The two are equal at about 100 tokens 64 wide and 256 tokens 512 and 2,048 wide.
    """
    return -(-max(out * features, 2**14) * features // (out + features))


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """Return x W^T + bias + scale dropout(x) A^T B^T.

    The tokens are flattened once, which each product would do, and the sum is part of the last product. Autograd saves
    x and x A^T and, with dropout, its mask as floats and what it returns.
    """
    x, shape = x.flatten(0, -2), x.shape
    hidden = F.linear(F.dropout(x, p) if p else x, a.to(x.dtype))
    y = torch.addmm(F.linear(x, weight, bias), hidden, b.to(x.dtype).t(), alpha=scale)
    return y.view(*shape[:-1], weight.shape[0])


def decomposed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float,
    p: float = 0.0,
) -> Tensor:
    """Return c (x V^T) + bias, where V = W + scale B A and c = m / ||V|| row by row.

    V of a tiny layer is built and kept for backward; that has the fewest operators, and saves less than HF PEFT does.
    Else no input is multiplied with V itself: autograd saves x, x A^T and x V^T. Where c is wider than a product, they
    meet in its type. With dropout, that is x W^T + bias + dropout(x) (c V - W)^T.
    """
    others = (weight, a, b, magnitude) if bias is None else (weight, a, b, magnitude, bias)
    if not p and weight.numel() <= TINY_WEIGHT and one_type(x, *others):
        return _built_and_decomposed(x, weight, bias, a, b, magnitude, scale)
    x, shape = x.flatten(0, -2), x.shape
    factor = _magnitude_over_norm(weight, a, b, magnitude, scale)
    dropped = F.dropout(x, p) if p else x
    plain = F.linear(dropped, weight)
    y = torch.addmm(plain, F.linear(dropped, a.to(x.dtype)), b.to(x.dtype).t(), alpha=scale)
    base = F.linear(x, weight, bias) - plain if p else bias
    if base is not None and y.dtype == factor.dtype == base.dtype:
        y = torch.addcmul(base, y, factor)
    else:
        y = (y * factor if base is None else y * factor + base).to(y.dtype)
    return y.view(*shape[:-1], weight.shape[0])


def _built_and_decomposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, magnitude: Tensor, scale: float
) -> Tensor:
    v = torch.addmm(weight, b, a, alpha=scale)
    y, factor = F.linear(x, v), magnitude_over_norm(v, magnitude)
    return y * factor if bias is None else torch.addcmul(bias, y, factor)


def _magnitude_over_norm(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """Return m / ||V|| of each row; no gradient flows through the norm.

    On the CPU, a few rows of V at a time stay in its cache; all of it would be written to memory and read again.
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

    With few inputs, autograd saves what torch's dropout saves; with more, ``x`` and one bit per input, and ``p`` counts
    in steps of 1 / 65536.
    """
    if element_count(x) < FLOAT_MASK:
        wide = factor_type(x)
        return F.linear(F.linear(F.dropout(x, p).to(wide), a.to(wide)) * scale, b.to(wide))
    kept, bits, p = draw_mask(x, p)
    with autocast_disabled(x) as dtype:
        return apply_function(DroppedLowRank, x, kept, bits, a, b, scale / (1 - p), dtype or factor_type(x))
