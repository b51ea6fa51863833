"""``read_4bit``, ``keep_differentiable``...: all access to names in bitsandbytes that one of its releases may change.

Other modules of the package take such names from here; a test reports which of them an installed release lacks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

LINEAR_4BIT = "bitsandbytes.nn.modules.Linear4bit"
LINEAR_8BIT = "bitsandbytes.nn.modules.Linear8bitLt"
_REPACKS, _REPACKED = "support_avx512bf16_for_cpu", "packing_format_for_cpu"


def make_linear_4bit(host: Any, weight: Tensor) -> None:
    """Turn a linear layer into a ``Linear4bit`` that stores a weight (out, in) as NF4 with quantized scales."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    empty = Linear4bit(
        host.in_features, host.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    vars(host).update({name: value for name, value in vars(empty).items() if name not in vars(host)})
    host.__class__ = Linear4bit
    keep_differentiable([host])
    host.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(weight.device)
    host.quant_state = host.weight.quant_state  # the layer keeps it when a move creates a new parameter


def forget_state(host: nn.Module) -> None:
    """Remove the attributes in which a layer of bitsandbytes keeps the state of its weight."""
    for name in ("quant_state", "state"):
        vars(host).pop(name, None)


def keep_differentiable(modules: Iterable[nn.Module]) -> None:
    """Keep layers from repacking weights in eval mode, as on some processors: rounded, and without gradients."""
    for module in modules:
        if _REPACKS in vars(module):
            vars(module)[_REPACKS] = False


def check_not_repacked(modules: Mapping[str, nn.Module]) -> None:
    """Raise where weights were repacked for inference on the CPU, which stops all gradients."""
    for name, module in modules.items():
        if getattr(vars(module).get("quant_state"), _REPACKED, False):
            raise ValueError(f"{name} was repacked by bitsandbytes for inference; load the model again, then inject.")


def read_4bit(host: Any) -> Tensor:
    """Return the weight (out, in) of a ``Linear4bit``."""
    from bitsandbytes import functional

    data, state = host.weight.detach(), getattr(host.weight, "quant_state", None) or host.quant_state
    if state is None:  # not quantized yet: moving it to a device does that
        return cast(Tensor, data)
    if getattr(state, _REPACKED, False):
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.deepcopy(state))
    return cast(Tensor, functional.dequantize_4bit(data, state))


def read_8bit(host: Any) -> Tensor:
    """Return the weight (out, in) of a ``Linear8bitLt``."""
    codes: Tensor = host.weight.detach()
    if codes.is_floating_point():
        return codes
    scale: Tensor = host.weight.SCB if host.state.SCB is None else host.state.SCB
    return codes * (scale[:, None] / 127)
