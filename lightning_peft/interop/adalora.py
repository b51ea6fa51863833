"""``AdaLoRAFormat``: ``lora_A`` is Q (rank, in), ``lora_B`` is P (out, rank), ``lora_E`` is E (rank, 1)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import AdaLoRA
from ..methods.families.svd_triplets import SVDTriplets
from ..ops.sharded_tensors import full_tensor
from ..structure.layer_of import layer_of
from ..structure.layer_types import LinearType, TransposedLinearType
from . import targets
from .misread_names import check_names
from .module_names import exact_globs, join_names
from .peft_format import (
    Base,
    PeftFile,
    PeftFormat,
    StateDict,
    check_convolution,
    check_not_torch_attention,
    check_supported,
)

_NAMES = {"lora_A": "a", "lora_B": "b", "lora_E": "e"}
_FIELDS = {  # our field for each setting of peft
    "init_r": "initial_rank",
    "target_r": "target_rank",
    "deltaT": "interval",
    "lora_dropout": "dropout",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orthogonal_weight",
    "tinit": "warmup_steps",
    "tfinal": "final_steps",
}


class AdaLoRAFormat(PeftFormat):
    """Files hold the kept triplets, which ``rank_pattern`` names; the scale is alpha / (init_r + 1e-5)."""

    kind, method, tensors = "ADALORA", AdaLoRA, tuple(_NAMES)
    settings = (*targets.SETTINGS, *_FIELDS, "lora_alpha", "modules_to_save", "ensure_weight_tying", "bias")
    ignored_settings = (
        *("r", "total_step", "rank_pattern", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
        *("megatron_core", "runtime_config", "qalora_group_size", "lora_ga_config"),
    )

    def to_peft(
        self, base: Base, method: AdaLoRA, hosts: Mapping[str, Sequence[SVDTriplets]]
    ) -> tuple[dict[str, Any], StateDict]:
        rank = max(sum(len(part.e) for part in triplets) for triplets in hosts.values())
        check_names(base, hosts, experts=False)
        state, patterns = StateDict(), dict[str, list[bool]]()
        for name, triplets in hosts.items():
            host = base.network.get_submodule(name)
            check_not_torch_attention(triplets[0], name)
            layer = layer_of(host)
            check_supported(not isinstance(host, nn.Conv2d) and not isinstance(layer, LinearType), f"AdaLoRA on {name}",
                   f"it adapts linear layers and Conv2d, not {type(host).__name__}")  # fmt: skip
            check_convolution(host, name, groups=False)
            a, b, e = _concatenated(layer.shape(host)[0], triplets)
            state |= {f"{self.prefix}{name}.{key}": t for key, t in zip(_NAMES, (a, b, e[:, None]), strict=True)}
            if len(e) < rank:
                patterns[f"{name}.lora_E"] = [i < len(e) for i in range(rank)]
        transposed = [isinstance(layer_of(base.network.get_submodule(name)), TransposedLinearType) for name in hosts]
        settings = targets.target_settings(base, hosts) | {
            "rank_pattern": patterns or None,
            "fan_in_fan_out": any(transposed),
        }
        return settings | _settings(method, next(iter(hosts.values()))[0].scale, rank), state

    def pair_of(self, config: Mapping[str, Any], host: str, tensors: StateDict) -> tuple[Tensor, Tensor]:
        state = _from_peft_names(tensors)
        kept = state["e"] != 0
        scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
        return state["a"][kept], state["b"][:, kept] * state["e"][kept] * scale

    def expected(self, base: Base, file: PeftFile) -> Iterator[str]:
        return targets.target_hosts(base, file.config)

    def from_peft(self, base: Base, file: PeftFile, name: str) -> Iterator[tuple[AdaLoRA, Mapping[str, StateDict]]]:
        fields = {
            field: file.config[setting] for setting, field in _FIELDS.items() if file.config.get(setting) is not None
        }
        alpha, rank = file.get("lora_alpha", 8), fields.pop("initial_rank", 12)
        groups = defaultdict[int, dict[str, StateDict]](dict)
        for host, tensors in file.state.items():
            module = base.network.get_submodule(host)
            check_convolution(module, host, groups=False)
            out_features, *shape = layer_of(module).shape(module)
            limit = min(rank, out_features, math.prod(shape))
            state = _limit_rank(_from_peft_names(tensors), limit)
            if "a" in state and state["a"].shape[1] == math.prod(shape):
                state["a"] = state["a"].view(-1, *shape)
            groups[limit][join_names(base.name, host)] = state
        for number, (limit, states) in enumerate(groups.items(), 1):
            patterns, exclude = exact_globs(states, base.model)
            target = min(fields.get("target_rank", 8), limit)
            yield (
                AdaLoRA(
                    name=name if number == 1 else f"{name}_{number}",
                    targets=patterns,
                    exclude=exclude,
                    initial_rank=limit,
                    alpha=alpha if limit == rank else alpha / (rank + 1e-5) * (limit + 1e-5),
                    **{**fields, "target_rank": target},
                ),
                states,
            )


def _settings(method: AdaLoRA, scale: float, rank: int) -> dict[str, Any]:
    settings = {setting: getattr(method, field) for setting, field in _FIELDS.items()}
    steps = {key: settings[key] or 0 for key in ("tinit", "tfinal")}
    total = sum(steps.values()) + 1  # it asks for some number, which the Trainer knows here
    alpha = method.alpha if rank == method.initial_rank else scale * (rank + 1e-5)
    return {**settings, **steps, "init_r": rank, "lora_alpha": alpha, "total_step": total}


def _concatenated(out: int, triplets: Sequence[SVDTriplets]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kept triplets of all projections of a host, joined: P is block diagonal."""
    packed = [{key: full_tensor(value).detach() for key, value in part.export_state().items()} for part in triplets]
    a, e = torch.cat([state["a"].flatten(1) for state in packed]), torch.cat([state["e"] for state in packed])
    b, column = a.new_zeros(out, len(a)), 0
    for part, state in zip(triplets, packed, strict=True):
        b[:, column : column + len(state["e"])] = part.rows.pad(state["b"].mT, out).mT
        column += len(state["e"])
    return a, b, e


def _from_peft_names(tensors: StateDict) -> StateDict:
    state = {_NAMES[key]: value for key, value in tensors.items()}
    return state | ({"e": state["e"].flatten()} if "e" in state else {})


def _limit_rank(state: StateDict, limit: int) -> StateDict:
    """Return at most ``limit`` triplets of the same product: more are multiplied out."""
    if state.keys() != {"a", "b", "e"} or len(state["e"]) <= limit:
        return state
    product = (state["b"] * state["e"]) @ state["a"]
    eye, ones = torch.eye(limit, dtype=product.dtype), product.new_ones(limit)
    tall = product.shape[0] > product.shape[1]
    return {"a": eye if tall else product, "b": product if tall else eye, "e": ones}
