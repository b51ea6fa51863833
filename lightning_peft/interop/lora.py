"""``LoRAFormat``: ``lora_A`` is A (rank, in, *kernel), ``lora_B`` is B (out, rank, 1...), the scale alpha / rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.method import Method
from ..methods import LoRA, TrainableTokens
from ..methods.families.lora_adapter import LoRAAdapter
from ..methods.families.low_rank_start import FROM_WEIGHT
from ..ops.sharded_tensors import full_tensor
from ..structure.layer_of import layer_of
from ..structure.layer_types import TransposedLinearType
from . import experts, targets, trainable_tokens
from .factors import alpha_for_scale, limit_rank, most_common_value
from .misread_names import check_names
from .module_names import exact_globs, join_names, longest_first
from .peft_format import (
    Base,
    PeftFile,
    PeftFormat,
    StateDict,
    check_convolution,
    check_not_torch_attention,
    check_supported,
)

_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_TABLE_A, _TABLE_B = "lora_embedding_A", "lora_embedding_B"  # of embeddings
_UNCHANGED = (True, False, "gaussian", "eva", "orthogonal")  # initialisations that leave the base as it is


class LoRAFormat(PeftFormat):
    """A host's projections become one pair: A below each other, B on the diagonal; so do factors the init subtracts."""

    kind, method = "LORA", LoRA
    tensors = (_A, _B, _TABLE_A, _TABLE_B, _MAGNITUDE, trainable_tokens.BESIDE)
    holds_tokens = True
    settings = (
        *targets.SETTINGS, experts.SETTING, "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern",
        "use_rslora", "use_dora", "bias", "modules_to_save", "ensure_weight_tying", "init_lora_weights",
        trainable_tokens.SETTING,
    )  # fmt: skip
    ignored_settings = (
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        *("megatron_core", "qalora_group_size"),
    )

    def to_peft(
        self, base: Base, method: LoRA, hosts: Mapping[str, Sequence[LoRAAdapter]]
    ) -> tuple[dict[str, Any], StateDict]:
        ranks, alphas, state = dict[str, int](), dict[str, float](), StateDict()
        use_rslora = method.scaling == "rank_stabilized"
        layers, of_experts = experts.split(base, hosts)
        check_names(base, layers, experts=True)
        for name, (rank, scale, tensors) in of_experts.items():
            state |= {self.prefix + key: value for key, value in tensors.items()}
            ranks[name], alphas[name] = rank, alpha_for_scale(scale, rank, use_rslora)
        for name, updates in layers.items():
            tensors = _tensors(base.network.get_submodule(name), name, updates)
            state |= {f"{self.prefix}{name}.{key}": value for key, value in tensors.items()}
            ranks[name] = len(tensors.get(_A, tensors.get(_TABLE_A, torch.empty(0))))
            alphas[name] = alpha_for_scale(updates[0].scale, ranks[name], use_rslora)
        rank, alpha = most_common_value(ranks), most_common_value(alphas)
        transposed = [isinstance(layer_of(base.network.get_submodule(name)), TransposedLinearType) for name in layers]
        settings = {
            **targets.target_settings(base, layers),
            **experts.target_settings(base, of_experts, method.dropout),
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": method.dropout,
            "rank_pattern": longest_first({name: r for name, r in ranks.items() if r != rank}),
            "alpha_pattern": longest_first({name: a for name, a in alphas.items() if a != alpha}),
            "use_rslora": use_rslora,
            "use_dora": method.decompose,
            "fan_in_fan_out": any(transposed),
            "bias": "none",
        }
        return settings, state

    def pair_of(self, config: Mapping[str, Any], host: str, tensors: StateDict) -> tuple[Tensor, Tensor] | None:
        if trainable_tokens.BESIDE in tensors or config.get(experts.SETTING) and not targets.is_targeted(host, config):
            return None
        state = _factors(tensors)
        alpha = targets.by_pattern(config.get("alpha_pattern") or {}, host, config["lora_alpha"])
        rank = len(state["a"])
        return state["a"].flatten(1), state["b"] * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def expected(self, base: Base, file: PeftFile) -> Iterator[str]:
        yield from targets.target_hosts(base, file.config)
        yield from experts.expected(base, file.config)

    def from_peft(self, base: Base, file: PeftFile, name: str) -> Iterator[tuple[Method, Mapping[str, StateDict]]]:
        tokens_name = TrainableTokens.name if name == self.name else f"{name}_tokens"
        file, tokens = trainable_tokens.read_beside(base, file, tokens_name)
        patterns, use_rslora = file.get("alpha_pattern", {}), bool(file.get("use_rslora", False))
        init = file.get("init_lora_weights", True)
        check_supported(
            init not in (*_UNCHANGED, *FROM_WEIGHT), f"init_lora_weights={init!r}", "it changes the base's weights"
        )
        alphas, states = dict[str, float](), dict[str, StateDict]()
        for host, tensors in file.state.items():
            if of_experts := experts.from_peft(base, file, host):
                states |= of_experts
                alphas |= {key: targets.by_pattern(patterns, key, file.get("lora_alpha", 8)) for key in of_experts}
                continue
            module = base.network.get_submodule(host)
            check_convolution(module, host, groups=False, dilation=False)
            alpha = targets.by_pattern(patterns, host, file.get("lora_alpha", 8))
            states[host], alphas[host] = limit_rank(_factors(tensors), alpha, use_rslora)
            if init in FROM_WEIGHT:
                states[host] |= _start(module, init, states[host], alphas[host], use_rslora)
        settings = {"dropout": file.get("lora_dropout", 0.0), "decompose": file.get("use_dora", False)}
        settings |= {"init": init} if init in FROM_WEIGHT else {}
        yield lora_from_factors(base, name, states, alphas, "rank_stabilized" if use_rslora else "standard", **settings)
        yield from tokens


def lora_from_factors(
    base: Base,
    name: str,
    states: Mapping[str, StateDict],
    alphas: Mapping[str, float],
    scaling: Literal["standard", "rank_stabilized"] = "standard",
    **settings: Any,
) -> tuple[LoRA, dict[str, StateDict]]:
    """Return the method for factors and alphas by host, and the factors by whole name."""
    by_name = {join_names(base.name, host): state for host, state in states.items()}
    ranks = {host: state["b"].shape[-1] if "b" in state else len(state.get("a", ())) for host, state in by_name.items()}
    alpha_by_name = {join_names(base.name, host): alpha for host, alpha in alphas.items()}
    rank, alpha = most_common_value(ranks), most_common_value(alpha_by_name)
    patterns, exclude = exact_globs(by_name, base.model)
    method = LoRA(
        name=name,
        targets=patterns,
        exclude=exclude,
        rank=rank,
        alpha=alpha,
        scaling=scaling,
        rank_pattern=longest_first({host: r for host, r in ranks.items() if r != rank}),
        alpha_pattern=longest_first({host: a for host, a in alpha_by_name.items() if a != alpha}),
        **settings,
    )
    return method, by_name


def _start(host: Any, init: str, state: StateDict, alpha: float, use_rslora: bool) -> StateDict:
    """Return the initial factors, which HF PEFT subtracts from the base's weight before it loads an adapter."""
    if "a" not in state:
        return {}
    rank, layer = len(state["a"]), layer_of(host)
    if layer.is_embedding:  # whose factors start at random there, whatever the setting says
        return {"a0": torch.zeros_like(state["a"]), "b0": torch.zeros_like(state["b"])}
    scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    a, b = FROM_WEIGHT[init](full_tensor(layer.read(host)).detach().to(state["a"].dtype).flatten(1), rank, scale)
    return {"a0": a.view(state["a"].shape), "b0": b}


def _tensors(host: Any, name: str, updates: Sequence[LoRAAdapter]) -> StateDict:
    layer, (first, *others) = layer_of(host), updates
    check_not_torch_attention(first, name)
    check_convolution(host, name, groups=False, dilation=False)
    check_supported(
        any(update.scale != first.scale for update in others), f"LoRA on {name}", "its parts have different scales"
    )
    check_supported(first.part != "" and first.magnitude is not None, f"DoRA on the {first.part} part of {name}",
           "it has one magnitude for each row of a layer")  # fmt: skip
    a, b = block_diagonal_pairs(layer.shape(host)[0], updates)
    tensors = {_TABLE_A: a, _TABLE_B: b} if layer.is_embedding else {_A: a, _B: b.view(*b.shape, *[1] * (a.dim() - 2))}
    if first.magnitude is not None:
        ones = [1] * (a.dim() - 2)
        magnitude = full_tensor(first.magnitude)
        tensors[_MAGNITUDE] = magnitude.view(1, -1, *ones) if ones else magnitude
    return tensors


def block_diagonal_pairs(out: int, updates: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return one A and one B for all projections of a host: A below each other, B block diagonal."""
    pairs = [(full_tensor(a), full_tensor(b)) for a, b in (update.pair() for update in updates)]
    a = torch.cat([a for a, _ in pairs])
    b, column = a.new_zeros(out, len(a)), 0
    for update, (_, b_of_part) in zip(updates, pairs, strict=True):
        b[:, column : column + b_of_part.shape[1]] = update.rows.pad(b_of_part.mT, out).mT
        column += b_of_part.shape[1]
    return a.detach(), b.detach()


def _factors(tensors: StateDict) -> StateDict:
    names = {_A: "a", _TABLE_A: "a", _B: "b", _TABLE_B: "b", _MAGNITUDE: "magnitude"}
    state = {names[key]: value for key, value in tensors.items()}
    if "b" in state:
        state["b"] = state["b"].flatten(1)
    if "magnitude" in state:
        state["magnitude"] = state["magnitude"].flatten()
    return state
