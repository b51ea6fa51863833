"""``read``, ``to_nf4``...: all access to names in torchao that one of its releases may change.

Other modules of the package take such names from here; a test reports which of them an installed release lacks.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor

WEIGHTS = (  # classes of weights in an ``nn.Linear``
    "torchao.utils.TorchAOBaseTensor",
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor",
    "torchao.dtypes.nf4tensor.NF4Tensor",  # until torchao 0.17
)


def read(host: Any) -> Tensor:
    """Return the weight (out, in) of a layer whose weight is a tensor of torchao."""
    return cast(Tensor, getattr(host.weight, "get_original_weight", host.weight.dequantize)())


class StoredNF4(NamedTuple):
    """Tensors in which NF4 stores a weight, with scales in 8 bits."""

    codes: Tensor  # two codes in each byte
    codes8: Tensor  # codes of scales, (groups of scales, scales)
    factor: Tensor  # factor of each group of scales
    mean: Tensor  # mean of the scales
    codebook: Tensor  # the 16 values that codes stand for


def to_nf4(weight: Tensor, block: int, scaler_block: int) -> StoredNF4:
    """Store a weight (out, in) as NF4.

    Args:
        weight: Weight in float32.
        block: Number of values that share a scale.
        scaler_block: Number of scales in a group.
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
