"""AdaLoRA: ``lora_A`` is Q (rank, in), ``lora_B`` is P (out, rank), ``lora_E`` is E (rank, 1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods import AdaLoRA
from ..methods.families.svd_triplets import SVDTriplets
from ..ops.sharded_tensors import full_tensor
from ..structure.layer_types import LinearType, TransposedLinearType, layer_of
from . import targets
from .module_names import globs, joined
from .peft_format import Base, File, PeftFormat, State, check_not_torch_attention, check_supported

_NAMES = {"lora_A": "a", "lora_B": "b", "lora_E": "e"}
_FIELDS = {  # of peft's settings, and of ours
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
    """Files hold the triplets that are kept: ``rank_pattern`` says which; the scale is alpha / (init_r + 1e-5)."""

    kind, method, tensors = "ADALORA", AdaLoRA, tuple(_NAMES)
    settings = (*targets.SETTINGS, *_FIELDS, "lora_alpha", "modules_to_save", "bias")
    ignored_settings = (
        *("r", "total_step", "rank_pattern", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
        *("megatron_core", "runtime_config", "qalora_group_size", "lora_ga_config", "ensure_weight_tying"),
    )

    def write(
        self, base: Base, method: AdaLoRA, hosts: Mapping[str, Sequence[SVDTriplets]]
    ) -> tuple[dict[str, Any], State]:
        rank = max(sum(len(one.e) for one in found) for found in hosts.values())
        state, patterns = State(), dict[str, list[bool]]()
        for name, found in hosts.items():
            host = base.network.get_submodule(name)
            check_not_torch_attention(found[0], name)
            layer = layer_of(host)
            check_supported(layer.is_embedding or not isinstance(layer, LinearType), f"AdaLoRA on {name}",
                   f"it adapts linear layers alone, not {type(host).__name__}")  # fmt: skip
            a, b, e = _joined(layer.shape(host)[0], found)
            state |= {f"{self.prefix}{name}.{key}": t for key, t in zip(_NAMES, (a, b, e[:, None]), strict=True)}
            if len(e) < rank:
                patterns[f"{name}.lora_E"] = [place < len(e) for place in range(rank)]
        transposed = [isinstance(layer_of(base.network.get_submodule(name)), TransposedLinearType) for name in hosts]
        settings = targets.written(base, hosts) | {"rank_pattern": patterns or None, "fan_in_fan_out": any(transposed)}
        return settings | _settings(method, next(iter(hosts.values()))[0].scale, rank), state

    def pair_of(self, config: Mapping[str, Any], host: str, own: State) -> tuple[Tensor, Tensor]:
        state = _read(own)
        live = state["e"] != 0
        scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
        return state["a"][live], state["b"][:, live] * state["e"][live] * scale

    def expected(self, base: Base, file: File) -> Iterator[str]:
        return targets.named(base, file.config)

    def read(self, base: Base, file: File, name: str) -> Iterator[tuple[AdaLoRA, Mapping[str, State]]]:
        ours = {field: file.config[theirs] for theirs, field in _FIELDS.items() if file.config.get(theirs) is not None}
        alpha, rank = file.get("lora_alpha", 8), ours.pop("initial_rank", 12)
        groups = defaultdict[int, dict[str, State]](dict)
        for host, own in file.state.items():
            layer = layer_of(base.network.get_submodule(host))
            out, features, *_ = layer.shape(base.network.get_submodule(host))
            most = min(rank, out, features)
            groups[most][joined(base.name, host)] = _within(_read(own), most)
        for number, (most, states) in enumerate(groups.items(), 1):
            found, exclude = globs(states, base.model)
            target = min(ours.get("target_rank", 8), most)
            yield (
                AdaLoRA(
                    name=name if number == 1 else f"{name}_{number}",
                    targets=found,
                    exclude=exclude,
                    initial_rank=most,
                    alpha=alpha if most == rank else alpha / (rank + 1e-5) * (most + 1e-5),
                    **{**ours, "target_rank": target},
                ),
                states,
            )


def _settings(method: AdaLoRA, scale: float, rank: int) -> dict[str, Any]:
    ours = {theirs: getattr(method, field) for theirs, field in _FIELDS.items()}
    steps = {key: ours[key] or 0 for key in ("tinit", "tfinal")}
    total = sum(steps.values()) + 1  # it asks for some number, which the Trainer knows here
    alpha = method.alpha if rank == method.initial_rank else scale * (rank + 1e-5)
    return {**ours, **steps, "init_r": rank, "lora_alpha": alpha, "total_step": total}


def _joined(out: int, found: Sequence[SVDTriplets]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kept triplets of all parts of a host at once."""
    packed = [{key: full_tensor(value).detach() for key, value in one.export_state().items()} for one in found]
    a, e = (torch.cat([own[key] for own in packed]) for key in ("a", "e"))
    b, column = a.new_zeros(out, len(a)), 0
    for one, own in zip(found, packed, strict=True):
        b[slice(*one.rows), column : column + len(own["e"])] = own["b"]
        column += len(own["e"])
    return a, b, e


def _read(own: State) -> State:
    state = {_NAMES[key]: value for key, value in own.items()}
    return state | ({"e": state["e"].flatten()} if "e" in state else {})


def _within(state: State, most: int) -> State:
    """Return triplets, no more than the sides of the weight, where there were more: one factor is the identity."""
    if state.keys() != {"a", "b", "e"} or len(state["e"]) <= most:
        return state
    product = (state["b"] * state["e"]) @ state["a"]
    eye, ones = torch.eye(most, dtype=product.dtype), product.new_ones(most)
    tall = product.shape[0] > product.shape[1]
    return {"a": eye if tall else product, "b": product if tall else eye, "e": ones}
