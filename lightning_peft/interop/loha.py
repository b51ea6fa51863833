"""``LoHaFormat``, our FedPara as an update: ``hada_w1_a`` is X1 (out, rank), ``hada_w1_b`` is Y1^T, and so on.

Of a convolution with cores both are transposed, ``hada_t1`` is T1; the scale is alpha / rank, ours is 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..methods import FedPara
from ..methods.families.hadamard import HadamardUpdate
from ..ops.sharded_tensors import full_tensor
from ..structure.layer_of import layer_of
from . import targets
from .factors import most_common_value
from .module_names import exact_globs, join_names, longest_first
from .peft_format import Base, PeftFile, PeftFormat, StateDict, check_convolution, check_supported

_NAMES = {"hada_w1_a": "x1", "hada_w1_b": "y1", "hada_w2_a": "x2", "hada_w2_b": "y2", "hada_t1": "t1", "hada_t2": "t2"}
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class LoHaFormat(PeftFormat):
    """Of pFedPara, the second matrix with its 1 has a rank one higher, and the first a column of zeros."""

    kind, method, tensors = "LOHA", FedPara, tuple(_NAMES)
    settings = (*targets.SETTINGS, "r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save")
    ignored_settings = ("init_weights", "use_effective_conv2d", "rank_dropout", "module_dropout")

    def to_peft(
        self, base: Base, method: FedPara, hosts: Mapping[str, Sequence[HadamardUpdate]]
    ) -> tuple[dict[str, Any], StateDict]:
        check_supported(method.tanh, "tanh in FedPara", "LoHa multiplies the matrices as they are")
        ranks, state = dict[str, int](), StateDict()
        for name, (adapter, *_) in hosts.items():
            host = base.network.get_submodule(name)
            check_host_type(host, name, adapter.part, _LAYERS, "LoHa")
            check_convolution(host, name)
            cores = adapter.t1 is not None
            check_supported(cores and adapter.t1 is not None and adapter.t1[0, 0].numel() == 1, f"Cores on {name}",
                   "convolutions of one place have none there; set cores=False")  # fmt: skip
            check_supported(
                cores and method.personalized, f"pFedPara with cores on {name}", "the 1 is of no low rank there"
            )
            factors = _with_rank_for_one(_factors(adapter)) if method.personalized else _factors(adapter)
            state |= {f"{self.prefix}{name}.{key}": value for key, value in _to_peft_names(factors).items()}
            ranks[name] = factors["x1"].shape[1]
        rank = most_common_value(ranks)
        pattern = longest_first({name: r for name, r in ranks.items() if r != rank})
        cores = any(updates[0].t1 is not None for updates in hosts.values())
        return {
            **targets.target_settings(base, hosts),
            **{"r": rank, "alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern},
            "use_effective_conv2d": cores,
        }, state

    def expected(self, base: Base, file: PeftFile) -> Iterator[str]:
        return targets.target_hosts(base, file.config)

    def from_peft(self, base: Base, file: PeftFile, name: str) -> Iterator[tuple[FedPara, Mapping[str, StateDict]]]:
        groups = defaultdict[tuple[int, bool], dict[str, StateDict]](dict)
        for host, tensors in file.state.items():
            module = base.network.get_submodule(host)
            check_convolution(module, host)
            out, features, *kernel = layer_of(module).shape(module)
            state = _from_peft_names(tensors, kernel)
            rank = state["x1"].shape[1] if "x1" in state else file.get("r", 8)
            alpha = targets.by_pattern(file.get("alpha_pattern", {}), host, file.get("alpha", 8))
            if alpha != rank and "x1" in state:
                state["x1"] = state["x1"] * (alpha / rank)
            if rank > min(out, features if "t1" in state else features * math.prod(kernel)):
                state, rank = _limit_rank(state, out, features * math.prod(kernel))
            groups[rank, "t1" in state][join_names(base.name, host)] = state
        for number, ((rank, cores), states) in enumerate(groups.items(), 1):
            patterns, exclude = exact_globs(states, base.model)
            method_name = name if number == 1 else f"{name}_{number}"
            yield FedPara(name=method_name, targets=patterns, exclude=exclude, rank=rank, cores=cores), states


def check_host_type(
    host: nn.Module, name: str, part: str, types: tuple[type[nn.Module], ...], adapter_kind: str
) -> None:
    """Refuse a host of another type, and one projection of a fused host."""
    host_type = type(host).__name__
    check_supported(
        not isinstance(host, types),
        f"{adapter_kind} on {name}",
        f"it adapts {[k.__name__ for k in types]}, no {host_type}",
    )
    check_supported(
        bool(part),
        f"{adapter_kind} on the {part} part of {name}",
        "it has factors for a whole layer; target it by a glob",
    )


def _factors(adapter: HadamardUpdate) -> StateDict:
    return {key: full_tensor(value).detach() for key, value in adapter.state_dict(keep_vars=True).items()}


def _with_rank_for_one(factors: StateDict) -> StateDict:
    """Return factors of one more rank, whose second matrix has the 1 in itself."""
    fill = {"x1": 0.0, "y1": 0.0, "x2": 1.0, "y2": 1.0}
    return {key: torch.cat([factors[key], factors[key].new_full((len(factors[key]), 1), fill[key])], 1) for key in fill}


def _to_peft_names(factors: StateDict) -> StateDict:
    peft_names = {field: peft_name for peft_name, field in _NAMES.items()}
    state = {}
    for key, value in factors.items():
        if key in ("t1", "t2"):
            state[peft_names[key]] = value if value.dim() == 4 else value[..., None]
        else:
            state[peft_names[key]] = value if key.startswith("x") and "t1" not in factors else value.T
    return state


def _from_peft_names(tensors: StateDict, kernel: Sequence[int]) -> StateDict:
    state = {}
    for peft_name, value in tensors.items():
        key = _NAMES[peft_name]
        if key in ("t1", "t2"):
            state[key] = value.view(*value.shape[:2], *kernel) if value[0, 0].numel() == math.prod(kernel) else value
        else:
            state[key] = value if key.startswith("x") and "hada_t1" not in tensors else value.T
    return state


def _limit_rank(state: StateDict, out: int, columns: int) -> tuple[StateDict, int]:
    """Return the matrices as factors without cores of the rank of their shorter side, and this rank."""
    limit = min(out, columns)
    eye, limited = torch.eye(limit, dtype=state["x1"].dtype), StateDict()
    for number in "12":
        x, y, core = (state.get(f"{factor}{number}") for factor in "xyt")
        if x is None or y is None:
            return state, limit  # whoever loads it says what is missing
        product = x @ y.T if core is None else torch.einsum("ab...,oa,ib->oi...", core, x, y).flatten(1)
        limited[f"x{number}"], limited[f"y{number}"] = (eye, product.T) if limit == out else (product, eye)
    return limited, limit
