"""LoRA and DoRA: ``lora_A`` is A (rank, in, *kernel), ``lora_B`` is B (out, rank, 1...), the scale alpha / rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..methods import LoRA
from ..methods.families.low_rank import FROM_WEIGHT
from ..methods.lora import LoRAAdapter
from ..ops.sharded_tensors import full_tensor
from ..structure.layer_types import TransposedLinearType, layer_of
from . import targets
from .module_names import by_length, globs, joined
from .peft_format import Base, File, PeftFormat, State, check_not_torch_attention, check_supported

_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_TABLE_A, _TABLE_B = "lora_embedding_A", "lora_embedding_B"  # of embeddings
_UNCHANGED = (True, False, "gaussian", "eva", "orthogonal")  # starts that leave the base as it is


class LoRAFormat(PeftFormat):
    """A host's parts become one pair: A below each other, B on the diagonal; so do factors that a start subtracts."""

    kind, method = "LORA", LoRA
    tensors = (_A, _B, _TABLE_A, _TABLE_B, _MAGNITUDE)
    settings = (
        *targets.SETTINGS, "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
        "bias", "modules_to_save", "init_lora_weights",
    )  # fmt: skip
    ignored_settings = (
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
    )

    def write(
        self, base: Base, method: LoRA, hosts: Mapping[str, Sequence[LoRAAdapter]]
    ) -> tuple[dict[str, Any], State]:
        ranks, alphas, state = dict[str, int](), dict[str, float](), State()
        rooted = method.scaling == "rank_stabilized"
        for name, found in hosts.items():
            own = _tensors(base.network.get_submodule(name), name, found)
            state |= {f"{self.prefix}{name}.{key}": value for key, value in own.items()}
            ranks[name] = len(own.get(_A, own.get(_TABLE_A, torch.empty(0))))
            alphas[name] = alpha_of(found[0].scale, ranks[name], rooted)
        rank, alpha = most_common(ranks), most_common(alphas)
        transposed = [isinstance(layer_of(base.network.get_submodule(name)), TransposedLinearType) for name in hosts]
        settings = {
            **targets.written(base, hosts),
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": method.dropout,
            "rank_pattern": by_length({name: r for name, r in ranks.items() if r != rank}),
            "alpha_pattern": by_length({name: a for name, a in alphas.items() if a != alpha}),
            "use_rslora": rooted,
            "use_dora": method.decompose,
            "fan_in_fan_out": any(transposed),
            "bias": "none",
        }
        return settings, state

    def pair_of(self, config: Mapping[str, Any], host: str, own: State) -> tuple[Tensor, Tensor]:
        state, alpha = _factors(own), targets.by_pattern(config.get("alpha_pattern") or {}, host, config["lora_alpha"])
        rank = len(state["a"])
        return state["a"].flatten(1), state["b"] * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def expected(self, base: Base, file: File) -> Iterator[str]:
        return targets.named(base, file.config)

    def read(self, base: Base, file: File, name: str) -> Iterator[tuple[LoRA, Mapping[str, State]]]:
        patterns, rooted = file.get("alpha_pattern", {}), bool(file.get("use_rslora", False))
        init = file.get("init_lora_weights", True)
        check_supported(
            init not in (*_UNCHANGED, *FROM_WEIGHT), f"init_lora_weights={init!r}", "it changes the base's weights"
        )
        alphas, states = dict[str, float](), dict[str, State]()
        for host, own in file.state.items():
            state, alpha = _factors(own), targets.by_pattern(patterns, host, file.get("lora_alpha", 8))
            states[host], alphas[host] = within_sides(state, alpha, rooted)
            if init in FROM_WEIGHT:
                states[host] |= _start(base.network.get_submodule(host), init, states[host], alphas[host], rooted)
        settings = {"dropout": file.get("lora_dropout", 0.0), "decompose": file.get("use_dora", False)}
        settings |= {"init": init} if init in FROM_WEIGHT else {}
        yield lora_of(base, name, states, alphas, "rank_stabilized" if rooted else "standard", **settings)


def lora_of(
    base: Base,
    name: str,
    states: Mapping[str, State],
    alphas: Mapping[str, float],
    scaling: Literal["standard", "rank_stabilized"] = "standard",
    **settings: Any,
) -> tuple[LoRA, dict[str, State]]:
    """Return the method for factors and alphas by host, and the factors by whole name."""
    placed = {joined(base.name, host): state for host, state in states.items()}
    ranks = {host: len(state.get("a", ())) for host, state in placed.items()}
    own = {joined(base.name, host): alpha for host, alpha in alphas.items()}
    rank, alpha = most_common(ranks), most_common(own)
    found, exclude = globs(placed, base.model)
    method = LoRA(
        name=name,
        targets=found,
        exclude=exclude,
        rank=rank,
        alpha=alpha,
        scaling=scaling,
        rank_pattern=by_length({host: r for host, r in ranks.items() if r != rank}),
        alpha_pattern=by_length({host: a for host, a in own.items() if a != alpha}),
        **settings,
    )
    return method, placed


def within_sides(state: State, alpha: float, rooted: bool = False) -> tuple[State, float]:
    """Return factors of no higher rank than a side, and their alpha: one is B A, the other the identity."""
    a, b = state.get("a"), state.get("b")
    if a is None or b is None or len(a) != b.shape[1] or len(a) <= min(len(b), a[0].numel()):
        return state, alpha
    product, most = b @ a.flatten(1), min(len(b), a[0].numel())
    eye = torch.eye(most, dtype=a.dtype)
    own = {"a": product, "b": eye} if most == len(b) else {"a": eye, "b": product}
    own["a"] = own["a"].view(-1, *a.shape[1:])
    scale = alpha / (math.sqrt(len(a)) if rooted else len(a))
    return state | own, alpha_of(scale, most, rooted)


def _start(host: Any, init: str, state: State, alpha: float, rooted: bool) -> State:
    """Return the factors of the start, which HF PEFT subtracts from the base's weight before it loads an adapter."""
    if "a" not in state:
        return {}
    rank, layer = len(state["a"]), layer_of(host)
    scale = alpha / (math.sqrt(rank) if rooted else rank)
    a, b = FROM_WEIGHT[init](full_tensor(layer.read(host)).detach().to(state["a"].dtype).flatten(1), rank, scale)
    return {"a0": a.view(state["a"].shape), "b0": b}


def most_common(values: Mapping[str, Any]) -> Any:
    """Return the value that most hosts have."""
    return Counter(values.values()).most_common(1)[0][0]


def alpha_of(scale: float, rank: int, rooted: bool = False) -> float:
    """Return the alpha that gives this scale, a whole number if one does."""
    divisor = math.sqrt(rank) if rooted else rank
    alpha = scale * divisor
    return round(alpha) if round(alpha) / divisor == scale else alpha


def _tensors(host: Any, name: str, found: Sequence[LoRAAdapter]) -> State:
    layer, (first, *others) = layer_of(host), found
    check_not_torch_attention(first, name)
    check_supported(
        getattr(host, "groups", 1) > 1, f"LoRA on {name}", "its convolution has groups, which it splits otherwise"
    )
    check_supported(
        any(one.scale != first.scale for one in others), f"LoRA on {name}", "its parts have different scales"
    )
    check_supported(first.part != "" and first.magnitude is not None, f"DoRA on the {first.part} part of {name}",
           "it has one magnitude for each row of a layer")  # fmt: skip
    a, b = joined_pairs(layer.shape(host)[0], found)
    own = {_TABLE_A: a, _TABLE_B: b} if layer.is_embedding else {_A: a, _B: b.view(*b.shape, *[1] * (a.dim() - 2))}
    if first.magnitude is not None:
        ones = [1] * (a.dim() - 2)
        magnitude = full_tensor(first.magnitude)
        own[_MAGNITUDE] = magnitude.view(1, -1, *ones) if ones else magnitude
    return own


def joined_pairs(out: int, found: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return A and B of all parts of a host at once."""
    pairs = [(full_tensor(a), full_tensor(b)) for a, b in (one.pair() for one in found)]
    a = torch.cat([a for a, _ in pairs])
    b, column = a.new_zeros(out, len(a)), 0
    for one, (_, own) in zip(found, pairs, strict=True):
        b[slice(*one.rows), column : column + own.shape[1]] = own
        column += own.shape[1]
    return a.detach(), b.detach()


def _factors(own: State) -> State:
    names = {_A: "a", _TABLE_A: "a", _B: "b", _TABLE_B: "b", _MAGNITUDE: "magnitude"}
    state = {names[key]: value for key, value in own.items()}
    if "b" in state:
        state["b"] = state["b"].flatten(1)
    if "magnitude" in state:
        state["magnitude"] = state["magnitude"].flatten()
    return state
