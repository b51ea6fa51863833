"""What this package trusts of torchao: the types of its weights, and what its NF4 tensors store.

Whatever else of the package needs such a name takes it from here; a test says in words what a release no longer has.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor

WEIGHTS = (  # types of a weight in a layer of torch
    "torchao.utils.TorchAOBaseTensor",
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor",
    "torchao.dtypes.nf4tensor.NF4Tensor",  # until torchao 0.17
)


def read(host: Any) -> Tensor:
    """Return the weight (out, in) of a layer whose weight is a tensor of torchao."""
    return cast(Tensor, getattr(host.weight, "get_original_weight", host.weight.dequantize)())


class StoredNF4(NamedTuple):
    """What NF4 stores of a weight, with scales in 8 bits."""

    codes: Tensor  # two to a byte
    codes8: Tensor  # of scales, (groups of scales, scales)
    factor: Tensor  # of each group
    mean: Tensor  # of the scales
    codebook: Tensor  # the 16 values


def to_nf4(weight: Tensor, block: int, scaler_block: int) -> StoredNF4:
    """Store a weight (out, in) as NF4.

    Args:
        weight: In float32.
        block: How many values share a scale.
        scaler_block: How many scales make a group.
    """
    x = nf4_tensor(weight, block, scaler_block)
    codes8 = x.quantized_scalers.view(len(x.quantization_factor), -1)
    return StoredNF4(x.quantized_data, codes8, x.quantization_factor, x.scaler_mean, x.nf4)


def nf4_tensor(weight: Tensor, block: int, scaler_block: int) -> Any:
    """Return the tensor that torchao makes of a weight (out, in), scales in 8 bits."""
    try:
        from torchao.quantization import to_nf4 as convert
    except ImportError:
        from torchao.dtypes.nf4tensor import to_nf4 as convert  # until torchao 0.17
    return convert(weight, block, scaler_block)
