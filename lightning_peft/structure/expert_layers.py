"""``expert_weights``: the weights of experts, 3-D parameters (experts, out, in) or (experts, in, out) of one module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.lazy_weights import LazyWeight
from ..ops.sharded_tensors import global_shape
from .base_model import base_modules, matches, name_pattern
from .expert_probe import Use, measure_products
from .quantized_experts import QuantizedExperts

UP, DOWN = "experts.up", "experts.down"
_measured: dict[Any, dict[str, Use] | None] = {}


@dataclass(frozen=True)
class ExpertWeight:
    """Knowledge about one weight of experts. The host, the module that holds it, is passed in.

    Args:
        part: Name of the parameter on its host.
        role: ``experts.up`` for what reads the tokens, ``experts.down`` for what reads outputs of the former.
        transposed: Whether each expert stores (in, out), and not (out, in).
    """

    part: str
    role: str
    transposed: bool

    def parameter(self, host: Any) -> Tensor:
        """Return the parameter as the host stores it."""
        parameter: Tensor = host._parameters[self.part]
        return parameter

    def stored_shape(self, host: Any) -> torch.Size:
        """Return (experts, a, b) as the host stores them, before quantization if it is quantized."""
        if isinstance(host, QuantizedExperts):
            return host.shape_of(self.part)
        return global_shape(self.parameter(host))

    def experts(self, host: Any) -> int:
        """Return the number of experts."""
        return self.stored_shape(host)[0]

    def shape(self, host: Any) -> torch.Size:
        """Return (out, in) of each expert."""
        _, a, b = self.stored_shape(host)
        return torch.Size((b, a) if self.transposed else (a, b))

    def factor(self, host: Any) -> Tensor | LazyWeight:
        """Return what products are taken with, as it is stored."""
        if isinstance(host, QuantizedExperts):
            factor: Tensor | LazyWeight = host.factor(self.part)
            return factor
        return self.parameter(host)

    @torch.no_grad()
    def read(self, host: Any, expert: int) -> Tensor:
        """Return the weight (out, in) of one expert."""
        weight: Any = self.factor(host)[expert]
        matrix: Tensor = weight.full() if isinstance(weight, LazyWeight) else weight.detach()
        return matrix.T if self.transposed else matrix

    @torch.no_grad()
    def write(self, host: Any, expert: int, weight: Tensor) -> None:
        """Replace the weight of one expert by another one of shape (out, in), rounding once."""
        if isinstance(host, QuantizedExperts) and self.part in host.quantized_parts():
            raise TypeError(f"{type(host).__name__} stores its weights in few bits; dequantize before merging.")
        self.parameter(host)[expert].copy_(weight.T if self.transposed else weight)


def expert_weights(host: nn.Module) -> dict[str, ExpertWeight]:
    """Return the weights of experts that a module holds, by the name of the parameter; empty for other modules.

    A module holds experts if its 3-D parameters have one first dimension, and if in its call some of them multiply
    what was computed with others of them. That, and which sides are inputs, is measured once for each class and shape.
    """
    if isinstance(host, QuantizedExperts):
        return dict(host.expert_weights)
    names = _stacked(host)
    uses = _uses(host, names) if names else None
    if uses is None or not any(use.downstream for use in uses.values()):
        return {}
    return {name: ExpertWeight(name, DOWN if use.downstream else UP, use.transposed) for name, use in uses.items()}


def expert_modules(model: nn.Module, role: str = "") -> list[str]:
    """Return the names of the modules that hold experts, with a weight of this role."""
    found = {name: expert_weights(module) for name, module in base_modules(model).items()}
    return [name for name, weights in found.items() if any(role in ("", w.role) for w in weights.values())]


def expert_weight_names(model: nn.Module) -> list[str]:
    """Return the names of all weights of experts in a model."""
    return [f"{name}.{part}" for name, module in base_modules(model).items() for part in expert_weights(module)]


def warn_of_unmeasured(model: nn.Module) -> None:
    """Say which modules hold several 3-D parameters of one first dimension, and could not be called to measure them."""
    modules = {name: host for name, host in base_modules(model).items() if not isinstance(host, QuantizedExperts)}
    several = {name: parts for name, host in modules.items() if len(parts := _stacked(host)) > 1}
    if unknown := [name for name, parts in several.items() if _uses(modules[name], parts) is None]:
        warnings.warn(
            f"all-linear leaves out 3-D parameters whose use could not be measured, in {described(unknown)}.",
            stacklevel=4,
        )


def warn_of_experts(model: nn.Module) -> None:
    """Say which modules hold experts, for methods that leave them out."""
    if experts := expert_modules(model):
        warnings.warn(
            f"all-linear leaves out the weights of experts in {described(experts)}: LoRA without decompose adapts "
            f"them, and this method does not.",
            stacklevel=4,
        )
    warn_of_unmeasured(model)


def described(names: Sequence[str]) -> str:
    """Return names in short, with ``*`` in place of the numbers of blocks."""
    return ", ".join(dict.fromkeys(map(name_pattern, names)))


def requested_weights(
    name: str, host: nn.Module, targets: Sequence[str], exclude: Sequence[str] = ()
) -> list[ExpertWeight]:
    """Return the weights that targets mean: by role, ``all-linear``, or a glob of the module or the parameter."""
    meant = [
        weight
        for weight in expert_weights(host).values()
        if any(t == "all-linear" or matches(name, t) or _means(name, weight, t) for t in targets)
    ]
    return [weight for weight in meant if not any(_means(name, weight, glob) for glob in exclude)]


def owners_of_experts(model: nn.Module, target: str) -> set[str]:
    """Return the names of the modules that hold a weight of experts which a role or a glob of its name means."""
    if target not in (UP, DOWN) and "." not in target:
        return set()  # as ``_means`` says of each weight
    return {
        name
        for name, module in base_modules(model).items()
        if any(_means(name, weight, target) for weight in expert_weights(module).values())
    }


def _means(name: str, weight: ExpertWeight, target: str) -> bool:
    """Return whether a target is a weight's role, or a glob of its name with a dot; ``down_proj`` means layers."""
    return target == weight.role or ("." in target and matches(f"{name}.{weight.part}", target))


def _stacked(host: nn.Module) -> list[str]:
    """Return the names of the 3-D parameters of a module, if they all have one first dimension above 1."""
    shapes = {name: p.shape for name, p in host._parameters.items() if p is not None and p.dim() == 3}
    alike = len({shape[0] for shape in shapes.values()}) == 1 and next(iter(shapes.values()))[0] > 1
    return list(shapes) if alike else []


def _uses(host: nn.Module, names: list[str]) -> dict[str, Use] | None:
    settings = sorted((k, v) for k, v in vars(host).items() if type(v) in (int, float, bool, str) and k != "training")
    cls = getattr(type(host), "_host_class", type(host))
    key = (cls, *((name, tuple(host._parameters[name].shape)) for name in names), *settings)  # type: ignore[union-attr]
    if key not in _measured:
        _measured[key] = measure_products(host, names)
    return _measured[key]
