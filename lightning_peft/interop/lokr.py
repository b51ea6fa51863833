"""``LoKrFormat``, our KronA: ``lokr_w1`` is A^T (a2, a1), ``lokr_w2`` is B^T (b2, b1, *kernel), scale alpha / r."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import KronA
from ..methods.krona import KronAUpdate
from ..ops.sharded_tensors import full_tensor
from ..structure.layer_of import layer_of
from . import targets
from .factors import alpha_for_scale
from .loha import check_host_type
from .module_names import exact_globs, join_names
from .peft_format import Base, PeftFile, PeftFormat, StateDict, check_convolution, check_supported

_NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class LoKrFormat(PeftFormat):
    """A factor that the file stores as a product is read as that product; ``decompose_factor`` gives the shapes."""

    kind, method, tensors = "LOKR", KronA, _NAMES
    settings = (*targets.SETTINGS, "r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save")
    ignored_settings = (
        *("init_weights", "use_effective_conv2d", "rank_dropout", "module_dropout", "rank_dropout_scale"),
        *("decompose_both", "decompose_factor"),
    )

    def to_peft(
        self, base: Base, method: KronA, hosts: Mapping[str, Sequence[KronAUpdate]]
    ) -> tuple[dict[str, Any], StateDict]:
        state, shapes = StateDict(), dict[str, tuple[tuple[int, int], tuple[int, int]]]()
        for name, (adapter, *_) in hosts.items():
            host = base.network.get_submodule(name)
            check_host_type(host, name, adapter.part, (nn.Linear, nn.Conv2d), "LoKr")
            check_convolution(host, name)
            w1, w2 = full_tensor(adapter.a).detach().T, full_tensor(adapter.b).detach().transpose(0, 1)
            state |= {f"{self.prefix}{name}.lokr_w1": w1, f"{self.prefix}{name}.lokr_w2": w2}
            shapes[name] = (w1.shape[1], w2.shape[1]), (w1.shape[0], w2.shape[0])
        rank = max(math.ceil(max(b1, b2) / 2) for (_, b1), (_, b2) in shapes.values())  # from which w2 is whole
        return {
            **targets.target_settings(base, hosts),
            **{"r": rank, "alpha": alpha_for_scale(method.scale, rank), "decompose_factor": _factor(shapes)},
        }, state

    def expected(self, base: Base, file: PeftFile) -> Iterator[str]:
        return targets.target_hosts(base, file.config)

    def from_peft(self, base: Base, file: PeftFile, name: str) -> Iterator[tuple[KronA, Mapping[str, StateDict]]]:
        groups = defaultdict[tuple[tuple[int, ...], float], dict[str, StateDict]](dict)
        for host, tensors in file.state.items():
            name_in_model, module = join_names(base.name, host), base.network.get_submodule(host)
            check_convolution(module, host)
            check_supported(
                isinstance(module, nn.Conv1d),
                f"LoKr on the one-dimensional {host}",
                "its product takes the kernel for rows",
            )
            a, b = _product(tensors, "lokr_w1"), _product(tensors, "lokr_w2")
            if a is None or b is None:
                raise ValueError(f"The file has {sorted(tensors)} of {host}, which are not both factors.")
            out_features, in_features, *kernel = layer_of(module).shape(module)
            b = b.reshape(-1, in_features // a.shape[1], *kernel)
            rank = targets.by_pattern(file.get("rank_pattern", {}), host, file.get("r", 8))
            alpha = targets.by_pattern(file.get("alpha_pattern", {}), host, file.get("alpha", 8))
            groups[tuple(a.T.shape), alpha / rank][name_in_model] = {"a": a.T, "b": b.transpose(0, 1)}
        for number, ((shape, scale), states) in enumerate(groups.items(), 1):
            patterns, exclude = exact_globs(states, base.model)
            method_name = name if number == 1 else f"{name}_{number}"
            yield KronA(name=method_name, targets=patterns, exclude=exclude, shape_a=list(shape), scale=scale), states


def _product(tensors: StateDict, name: str) -> Tensor | None:
    if name in tensors:
        return tensors[name]
    first, second, core = tensors.get(f"{name}_a"), tensors.get(f"{name}_b"), tensors.get("lokr_t2")
    if first is None or second is None:
        return None
    if core is not None and name == "lokr_w2":
        return torch.einsum("ab...,ao,bi->oi...", core, first, second)
    return first @ second


def _factor(shapes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]) -> int:
    """Return the ``decompose_factor`` that gives these pairs of sides."""
    pairs = {pair for sides in shapes.values() for pair in sides}
    for factor in (-1, *sorted({pair[0] for pair in pairs})):
        if all(_split(first * second, factor) == (first, second) for first, second in pairs):
            return factor
    name, (inputs, outputs) = next(iter(shapes.items()))
    check_supported(
        True,
        f"KronA with {inputs} inputs and {outputs} outputs at {name}",
        "no one factor gives the shapes of all layers; set factor, or shape_a with two equal sides",
    )
    return 0


def _split(size: int, factor: int) -> tuple[int, int]:
    """Return the sides that LoKr gives a dimension: ``factor`` first if it divides, else the nearest pair below it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= limit)
    return small, size // small
