"""Experts in files of HF PEFT: ``target_parameters``, with a nested wrapper for each parameter of a module.

The first parameter of a module is wrapped innermost, so that its A is called ``experts.base_layer.lora_A.weight``, and
that of the last one ``experts.lora_A.weight``. A is stored as (experts * rank, in), B as (out, rank * experts).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..checkpoints.adapter_state import strip_wrapper_names
from ..methods.families.expert_low_rank import ExpertLowRankAdapter
from ..ops.sharded_tensors import full_tensor
from ..structure.base_model import base_modules
from ..structure.expert_layers import expert_weights
from .module_names import unique_suffixes
from .peft_format import Base, PeftFile, StateDict, check_supported

SETTING = "target_parameters"
NESTED = "base_layer."
_A, _B = "lora_A.weight", "lora_B.weight"


def split(
    base: Base, hosts: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, Sequence[Any]], dict[str, tuple[int, float, StateDict]]]:
    """Return the hosts that are layers; and of each weight of experts its rank, its scale and its tensors by key."""
    of_experts = {name: updates for name, updates in hosts.items() if isinstance(updates[0], ExpertLowRankAdapter)}
    weights = dict[str, tuple[int, float, StateDict]]()
    for name, updates in of_experts.items():
        for update, tensors in _nested(base.network.get_submodule(name), updates):
            by_key = {f"{name}.{key}": value for key, value in tensors.items()}
            weights[f"{name}.{update.part}"] = update.pair()[0].shape[1], update.scale, by_key
    return {name: updates for name, updates in hosts.items() if name not in of_experts}, weights


def _nested(host: Any, updates: Sequence[Any]) -> Iterator[tuple[ExpertLowRankAdapter, StateDict]]:
    """Yield (adapter, tensors) of each adapter of a host; keys of tensors follow the name of the host."""
    ordered = sorted(updates, key=lambda update: list(host._parameters).index(update.part))
    for depth, update in enumerate(reversed(ordered)):
        a, b = (full_tensor(factor).detach() for factor in update.pair())
        if _seen_otherwise(host, update.weight.transposed):
            a, b = b.mT, a.mT
        tensors = {_A: a.flatten(0, 1), _B: b.permute(1, 2, 0).flatten(1)}
        yield update, {NESTED * depth + key: value.contiguous() for key, value in tensors.items()}


def target_settings(base: Base, weights: Collection[str], dropout: float) -> dict[str, Any]:
    """Return settings that name exactly these weights of experts."""
    check_supported(bool(weights) and dropout > 0, "Dropout on experts", "it adds the update to their weights")
    names = [strip_wrapper_names(name) for name, _ in base.network.named_parameters()]
    return {SETTING: unique_suffixes(weights, names)} if weights else {}


def from_peft(base: Base, file: PeftFile, host: str) -> dict[str, StateDict]:
    """Return A and B of a host's experts, by the name of their weight; empty for other hosts."""
    module, tensors = base.network.get_submodule(host), file.state[host]
    weights = expert_weights(module)
    targeted = [part for part in module._parameters if _is_targeted(f"{host}.{part}", file.config)]
    if not (targeted or weights):
        return {}
    check_supported(targeted != [part for part in targeted if part in weights], f"{SETTING} {targeted} of {host}",
           "they are no weights of experts")  # fmt: skip
    check_supported(file.get("init_lora_weights", True) in ("pissa", "olora"), f"init_lora_weights on {host}",
           "it changes the base's weights")  # fmt: skip
    found = dict[str, StateDict]()
    for depth, part in enumerate(reversed(targeted)):
        own = {key: value for key, value in tensors.items() if key in (NESTED * depth + _A, NESTED * depth + _B)}
        experts = weights[part].experts(module)
        if len(own) == 2:
            a, b = (own[NESTED * depth + key] for key in (_A, _B))
            a, b = a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1).contiguous()
            found[f"{host}.{part}"] = (
                {"a": b.mT.contiguous(), "b": a.mT.contiguous()}
                if _seen_otherwise(module, weights[part].transposed)
                else {"a": a, "b": b}
            )
    if len(found) * 2 != len(tensors) or len(found) != len(targeted):
        raise ValueError(f"The file's settings adapt {targeted} of {host}, and it has the tensors {sorted(tensors)}.")
    return found


def expected(base: Base, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the modules of which parameters are adapted; raise if a target is no parameter."""
    parameters = [name for name, _ in base.network.named_parameters()]
    for target in config.get(SETTING) or []:
        if not any(_is_targeted(name, {SETTING: [target]}) for name in parameters):
            raise ValueError(f"The file sets {SETTING} {target!r}, which is no parameter of this model.")
    for name, module in base_modules(base.network).items():
        if any(_is_targeted(f"{name}.{part}", config) for part in module._parameters):
            yield name


def _is_targeted(name: str, config: Mapping[str, Any]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in config.get(SETTING) or [])


def _seen_otherwise(host: nn.Module, transposed: bool) -> bool:
    """Return whether HF PEFT takes (in, out) for (out, in), or vice versa: it asks for an attribute of the module."""
    return bool(getattr(host, "is_transposed", False)) != transposed
