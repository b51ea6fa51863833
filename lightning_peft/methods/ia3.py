"""(IA)3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper, https://arxiv.org/abs/2205.05638."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, Call, parameter_like
from ..layers import layer_of
from ..method import Method, require
from ..select import parts, select


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Scales keys, values and the activations inside feed-forward blocks by learned vectors l, which start at one.

    Keys and values: l o (W x + b), on their projections. Activations: W (l o x) + b, on the down-projections. A layer
    that computes query, key and value at once has an own vector for each part. Merges.

    Args:
        name: Name of the adapters on their hosts, and in files.
        targets: Globs or roles of layers whose outputs are scaled.
        feedforward_targets: Globs or roles of layers whose inputs are scaled; may be empty.
        exclude: Globs of modules to leave out.
    """

    name: str = "ia3"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention.key", "attention.value"])
    feedforward_targets: list[str] = dataclasses.field(default_factory=lambda: ["feedforward.down"])
    exclude: list[str] = dataclasses.field(default_factory=list)

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Scaling]]:
        inputs = list(select(model, self.feedforward_targets, self.exclude)) if self.feedforward_targets else []
        outputs = list(select(model, self.targets, self.exclude)) if self.targets else []
        chosen = select(model, [*self.targets, *self.feedforward_targets], self.exclude)
        for name, host in chosen.items():
            layer = layer_of(host)
            require(not layer.looks_up and not layer.is_read, f"target {name}", type(host).__name__, "a called layer")
            require(not (name in inputs and name in outputs), "target", name, "in one of both lists of targets")
            if name in inputs:
                yield name, Scaling(host, of_inputs=True)
            else:
                for part in parts(name, host, self.targets):
                    yield name, Scaling(host, part=part)


class Scaling(Adapter):
    """l o host(x) with l (out,), or host(l o x) with l (in,).

    Args:
        host: Layer whose outputs or inputs are scaled.
        of_inputs: Whether inputs are.
        part: Rows of a fused layer whose outputs are scaled.
    """

    def __init__(self, host: Any, of_inputs: bool = False, part: tuple[str, int, int] | None = None) -> None:
        super().__init__()
        self.layer, self.of_inputs = layer_of(host), of_inputs
        out, features, *kernel = self.layer.shape(host)
        features *= getattr(host, "groups", 1)
        self.part, first, stop = part or ("", 0, out)
        self.rows, self.outside = slice(first, stop), (first, out - stop)
        self.trailing = [1] * len(kernel)  # the dimensions that follow features
        self.scales = parameter_like(self.layer.parameter(host), features if of_inputs else stop - first)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scales)

    def forward(self, host: Any, inner: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.of_inputs:
            result: Tensor = inner(x * self.scales.to(x.dtype).view(-1, *self.trailing), *args, **kwargs)
            return result
        y: Tensor = inner(x, *args, **kwargs)
        whole = F.pad(self.scales, self.outside, value=1.0) if any(self.outside) else self.scales
        return y * whole.to(y.dtype).view(-1, *self.trailing)

    @torch.no_grad()
    def merge(self, host: Any) -> None:
        weight = self.layer.read(host)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.of_inputs:
            groups = getattr(host, "groups", 1)
            inputs = self.scales.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
            self.layer.write(host, wide * inputs.view(len(weight), -1, *self.trailing))
            return
        self.layer.write(host, wide[self.rows] * self.scales.view(-1, *[1] * (weight.dim() - 1)), self.rows.start)
        if host.bias is not None:
            host.bias[self.rows].mul_(self.scales.to(host.bias.dtype))
