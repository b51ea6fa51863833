"""``IA3``: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper, https://arxiv.org/abs/2205.05638."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call, InnerCall, parameter_like
from ..core.method import Method, check_setting
from ..core.per_row import BatchableLayerAdapter
from ..structure.base_model import matches
from ..structure.layer_of import layer_of
from ..structure.roles import linear_branch
from ..structure.rows import Rows
from ..structure.selection import select, select_modules
from ..structure.structure_of import structure_of
from ..structure.towers import split_scope
from .families.fused_scaling import scaled_input, scaled_output


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Scales keys, values and the activations inside feed-forward blocks by learned vectors l, which start at one.

    Keys and values: l o (W x + b), on their projections. Activations: W (l o x) + b, on the down-projections. A layer
    that computes query, key and value at once has a separate vector for each part. IA3 can be merged.

    In a gated block (T5 v1.1, Llama), l scales the output of the up-projection without activation, as in the authors'
    code: this is the same function and saves less for backward. A down-projection that is named by a glob is scaled
    itself.

    Args:
        name: Name of the adapters on their hosts, and in files.
        targets: Globs or roles of layers whose outputs are scaled.
        feedforward_targets: Globs or roles of layers whose inputs are scaled; may be empty.
        exclude: Globs of modules to leave out.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> _ = lp.inject(model, lp.IA3(targets=["0"], feedforward_targets=["2"]))
        >>> lp.summary(model).trainable  # 8 outputs of the first layer, 8 inputs of the second
        16
    """

    name: str = "ia3"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention.key", "attention.value"])
    feedforward_targets: list[str] = dataclasses.field(default_factory=lambda: ["feedforward.down"])
    exclude: list[str] = dataclasses.field(default_factory=list)

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Scaling]]:
        feedforward_targets = self._feedforward_targets(model)
        select_modules(model, [*self.targets, *feedforward_targets], self.exclude)  # one of both may be empty
        outputs = select(model, self.targets, self.exclude) if self.targets else []
        inputs = select(model, feedforward_targets, self.exclude) if feedforward_targets else []
        names = {target.name for target in outputs}
        for name, host, _ in [*outputs, *inputs]:
            check_setting(not layer_of(host).is_embedding, f"target {name}", type(host).__name__, "a layer of features")
        for name, host, rows in outputs:
            yield name, Scaling(host, rows=rows)
        for name, host, _ in inputs:
            check_setting(name not in names, "target", name, "in one of both lists of targets")
            if (up := self._gated_up(model, name)) is not None and up not in names:
                yield up, Scaling(model.get_submodule(up))
            else:
                yield name, Scaling(host, of_inputs=True)

    def _feedforward_targets(self, model: nn.Module) -> list[str]:
        """Return ``feedforward_targets``, without the role if a trace shows that only experts are feed-forward."""
        structure, role = structure_of(model), "feedforward.down"
        if role not in self.feedforward_targets or structure.names[role] or not structure.measured or not self.targets:
            return self.feedforward_targets
        warnings.warn(f"IA3 leaves out {role}: the model has no feed-forward networks besides experts.", stacklevel=2)
        return [target for target in self.feedforward_targets if target != role]

    def _gated_up(self, model: nn.Module, down: str) -> str | None:
        """Return the up-projection whose output can be scaled in place of the down-projection's input."""
        up = linear_branch(model, down)
        named_by_glob = any(matches(down, split_scope(target)[1]) for target in self.feedforward_targets)
        excluded = up is not None and any(matches(up, pattern) for pattern in self.exclude)
        return None if named_by_glob or excluded else up


class Scaling(BatchableLayerAdapter, Adapter):
    """l o host(x) with l (out,), or host(l o x) with l (in,).

    Args:
        host: Layer whose outputs or inputs are scaled.
        of_inputs: Whether inputs are.
        rows: Rows of a fused layer whose outputs are scaled.
    """

    rows: Rows

    def __init__(self, host: Any, of_inputs: bool = False, rows: Rows | None = None) -> None:
        super().__init__()
        self.layer, self.of_inputs = layer_of(host), of_inputs
        self.tensor_parallel_dims = {"scales": ("in" if of_inputs else "out",)}
        out, features, *kernel = self.layer.shape(host)
        features *= getattr(host, "groups", 1)
        self.rows, self.host_rows = rows or Rows("", 0, out), out
        self.part, self.pads = self.rows.part, not of_inputs and self.rows.size < out
        self.scales = parameter_like(self.layer.parameter(host), features if of_inputs else self.rows.size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scales)

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        if self.layer.weight_read_by_parent:
            return inner(*args, **kwargs)  # the host reads weight and bias from properties that return the scaled ones
        return self._called(host, inner, *args, **kwargs)

    def _called(self, host: Any, inner: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = functools.partial(inner, *args, **kwargs) if args or kwargs else inner
        scales = self.whole()
        # Scalings that follow one another are one product, which is cheaper and saves one tensor for backward.
        while isinstance(call, InnerCall) and call.adapters and self._is_alike(call.adapters[-1]):
            scales, call = scales * call.adapters[-1].whole(), call.without_outermost()
        return (scaled_input if self.of_inputs else scaled_output)(self.layer, host, call, x, scales)

    def _is_alike(self, other: Adapter) -> TypeGuard[Scaling]:
        """Return whether another adapter scales inputs as this one does, or outputs as this one does."""
        return isinstance(other, Scaling) and other.of_inputs == self.of_inputs

    def per_example_tensors(self) -> tuple[Any, ...]:
        return ((Scaling, self.of_inputs), self.whole()) if self.layer.maps_features else ()

    def pre_forward(self, host: Any, x: Tensor, *values: Any) -> Tensor:
        return self._scaled(host, x, *values) if self.of_inputs else x

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        return y if self.of_inputs else self._scaled(host, y, *values)

    def _scaled(self, host: Any, x: Tensor, *values: Tensor) -> Tensor:
        (scales,) = values or (self.whole(),)
        shape = scales.shape if values else (-1, *[1] * (len(self.layer.shape(host)) - 2))
        return (x * scales.view(shape)).to(x.dtype)

    def whole(self) -> Tensor:
        """Return a scale for each input, or for each output of the host: ones outside of the scaled rows."""
        return self.rows.pad(self.scales, self.host_rows, fill=1.0) if self.pads else self.scales

    def effective_weight(self, weight: Tensor) -> Tensor:
        return (weight * (self.scales if self.of_inputs else self.whole()[:, None])).to(weight.dtype)

    def effective_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.of_inputs else (bias * self.whole()).to(bias.dtype)

    @torch.no_grad()
    def merge(self, host: Any) -> None:
        weight, bias = self.layer.read(host), self.layer.bias(host)
        ones = [1] * (weight.dim() - 2)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.of_inputs:
            groups = getattr(host, "groups", 1)
            inputs = self.scales.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
            self.layer.write(host, wide * inputs.view(len(weight), -1, *ones))
            return
        for first, rows in self.rows.split(self.rows.take(wide) * self.scales.view(-1, 1, *ones)):
            self.layer.write(host, rows, first)
        if bias is not None:
            bias.copy_(bias * self.whole())  # in the type of the bias, rounded once
