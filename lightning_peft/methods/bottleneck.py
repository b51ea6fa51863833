"""``Bottleneck``, Houlsby's adapters: Parameter-Efficient Transfer Learning for NLP, https://arxiv.org/abs/1902.00751."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter, Call, has_values, parameter_like
from ..core.method import Method, check_setting
from ..core.per_row import BatchableLayerAdapter
from ..structure.read_weights import read_weight_attribute
from ..structure.roles import ROLES
from ..structure.selection import select_modules, select_parameters
from .families.bottleneck_mlp import add_bottleneck, check_bottleneck, output_of


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """Passes the output of each sub-layer through a small network: y + W_up phi(W_down y + b_down) + b_up.

    Each block has two, after the attention's output projection and after the feed-forward's down-projection, before a
    dropout, the skip connection and the norm that may follow. Both weights start near zero, so that an adapted model
    starts near its base. One in each block, as in https://arxiv.org/abs/2005.00247 but without a norm in between, is
    ``Bottleneck(targets=["feedforward.down"], activation="relu", train_norms=False)``. It cannot be merged.

    Args:
        name: Name of the adapters on their hosts, and in files.
        size: Number m of features between the two layers.
        activation: ``gelu`` as the authors' code, ``relu`` or ``swish``.
        targets: Globs or roles of modules whose output, or the first of several, is changed. In place of the output
            projection of ``nn.MultiheadAttention``, which is never called, the attention itself is adapted.
        exclude: Globs of modules to leave out.
        std: Standard deviation of the truncated normal distribution that both weights start from, cut off at twice
            that; the authors' code has 1e-3.
        train_norms: Whether all normalization layers train too.
        train_head: Whether the head of the task trains too, if the model has one.

    Raises:
        ValueError: A target contains no linear layer, from which its width is read.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
        >>> method = lp.Bottleneck(size=4, targets=["0"], train_norms=False, train_head=False)
        >>> lp.summary(lp.inject(model, method)).trainable  # weights of 2 x 16 x 4, biases of 4 + 16
        148
    """

    name: str = "bottleneck"
    size: int = 64
    activation: str = "gelu"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention.output", "feedforward.down"])
    exclude: list[str] = dataclasses.field(default_factory=list)
    std: float = 1e-2
    train_norms: bool = True
    train_head: bool = True

    def __post_init__(self) -> None:
        check_bottleneck(self.size, self.activation)
        check_setting(self.std >= 0, "std", self.std, "0 or more")

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, SerialBottleneck]]:
        hosts = dict[str, nn.Module]()
        for name, host in select_modules(model, self.targets, self.exclude).items():
            if read_weight_attribute(type(host)) == "weight":
                name = name.rpartition(".")[0]
            hosts[name] = model.get_submodule(name)
        for name, host in hosts.items():
            yield name, SerialBottleneck(*output_of(host, name), self.size, self.activation, self.std)

    def parameters(self, model: nn.Module) -> Iterable[str]:
        trains = {"norms": self.train_norms, "head": self.train_head}
        roles = [role for role in trains if trains[role] and any(ROLES[role](model))]
        return select_parameters(model, roles, roles_only=True)


class SerialBottleneck(BatchableLayerAdapter, Adapter):
    """y + up phi(down y + down_bias) + up_bias, where y is the host's output, or the first of several.

    Args:
        width: Number of features of y.
        weight: Weight of the host, for device and type.
        size: Number of features in between.
        activation: Name of phi.
        std: Of ``down`` (size, width) and ``up`` (width, size) at the start.
    """

    tensor_parallel_dims = {}
    unmergeable = "it is not linear, so no weight expresses it"

    def __init__(self, width: int, weight: Tensor, size: int, activation: str, std: float) -> None:
        super().__init__()
        self.activation, self.std = activation, std
        self.down, self.down_bias = parameter_like(weight, size, width), parameter_like(weight, size)
        self.up, self.up_bias = parameter_like(weight, width, size), parameter_like(weight, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in filter(has_values, (self.down, self.up)):  # it draws again until all values are inside
            nn.init.trunc_normal_(weight, std=self.std, a=-2 * self.std, b=2 * self.std)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (self.post_forward(host, output[0], output[0]), *output[1:])
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(host).__name__} returns a {type(output).__name__}; target what returns a tensor.")
        return self.post_forward(host, output, output)

    def per_example_tensors(self) -> tuple[Any, ...]:
        return (SerialBottleneck, self.activation), self.down, self.down_bias, self.up, self.up_bias

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        down, down_bias, up, up_bias = values or (self.down, self.down_bias, self.up, self.up_bias)
        return add_bottleneck(y, y, (down, down_bias), (up, up_bias), self.activation)

    def extra_repr(self) -> str:
        return f"size={len(self.down)}, activation={self.activation}"
