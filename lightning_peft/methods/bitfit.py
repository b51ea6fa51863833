"""``BitFit``: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, https://arxiv.org/abs/2106.10199."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, Call, InnerCall, parameter_like
from ..core.method import Method
from ..ops.factor_type import in_type
from ..structure.base_model import base_parameters, name_pattern
from ..structure.layer_of import is_called_linear, layer_of
from ..structure.selection import select_modules, select_parameters
from ..structure.structure_of import structure_of


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Trains the biases of the base model and nothing else; a new head trains through ``also_train``.

    Args:
        name: Name of the method.
        targets: Globs of modules or parameters whose biases train; if empty, all on which an output depends.
        add_missing: Whether linear layers of the blocks that have no bias get one, starting at zero, as T-Few's authors
            did for T5 (https://arxiv.org/abs/2205.05638); also in Llama, Gemma and others. With targets, those layers
            among them. A merged model has biases that its class does not build, which ``from_pretrained`` would leave
            out: keep its modules, or the adapter.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)), lp.BitFit())
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.bias', '2.bias']
    """

    name: str = "bitfit"
    targets: list[str] = dataclasses.field(default_factory=list)
    add_missing: bool = False

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, AddedBias]]:
        if self.add_missing:
            for name, host in select_modules(model, self.targets or ["all-linear"]).items():
                if is_called_linear(host) and getattr(host, "bias", None) is None:
                    yield name, AddedBias(host)

    def parameters(self, model: nn.Module) -> Iterable[str]:
        selected = select_parameters(model, self.targets) if self.targets else list(base_parameters(model))
        names = [name for name in selected if "bias" in name.rpartition(".")[2]]
        names = names if self.targets else _without_unused(model, names)
        if not names and not self.add_missing:
            where = f"What targets={self.targets!r} names" if self.targets else type(model).__name__
            raise ValueError(
                f"{where} has no biases to train; BitFit(add_missing=True) gives linear layers of its blocks zero "
                f"biases, which train."
            )
        return names


def _without_unused(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the biases without those on which no output depends, which a warning names.

    Of biases that repeat, as those of experts in a list, one that matters keeps those of layers without a call.
    """
    structure = structure_of(model)
    unused, called = set(structure.names.get("unused", ())), set(structure.names["called"])
    repeated = {name_pattern(name) for name in names if name not in unused}
    left_out = [n for n in names if n in unused and (n.rpartition(".")[0] in called or name_pattern(n) not in repeated)]
    if left_out:
        warnings.warn(
            f"BitFit leaves out {len(left_out)} biases, since no output depends on them: {', '.join(left_out[:4])}"
            f"{', ...' * (len(left_out) > 4)}. Name them as targets to train them all the same.",
            stacklevel=2,
        )
    return [name for name in names if name not in left_out]


class AddedBias(Adapter):
    """y = host(x) + bias, for a linear layer without a bias; the bias starts at zero."""

    tensor_parallel_dims = {"bias": ("out",)}
    merges_bias_alone = True

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.layer = layer_of(host)
        self.bias = parameter_like(host.weight, self.layer.shape(host)[0])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and self._is_bias_of_product(host, inner):
            weight = self.layer.read(host)
            return F.linear(*args, weight, in_type(self.bias, weight.dtype))
        y: Tensor = inner(*args, **kwargs)
        return y + in_type(self.bias, y.dtype)

    def _is_bias_of_product(self, host: Any, inner: Call) -> bool:
        """Return whether ``inner`` is a plain product without a bias, so that both are one operator."""
        if not isinstance(inner, InnerCall) or inner.adapters or host.bias is not None:
            return False
        return self.layer.is_plain_matmul(host, inner.forward)

    def merge(self, host: Any) -> None:
        """Register the bias as that of the host, or add it to one that another adapter has given the host."""
        own, bias = self.layer.bias(host), self.bias.detach()
        self.layer.write_bias(host, bias if own is None else own + bias)
