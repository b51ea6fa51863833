"""LoHa, which is FedPara as an update: ``hada_w1_a`` is X1 (out, rank), ``hada_w1_b`` is Y1^T, and so on.

Of a convolution with cores both are transposed, ``hada_t1`` is T1; the scale is alpha / rank, ours is 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..methods import FedPara
from ..methods.families.hadamard import HadamardUpdate
from ..ops.sharded_tensors import full_tensor
from . import targets
from .lora import most_common
from .module_names import by_length, globs, joined
from .peft_format import Base, File, PeftFormat, State, check_supported

_NAMES = {"hada_w1_a": "x1", "hada_w1_b": "y1", "hada_w2_a": "x2", "hada_w2_b": "y2", "hada_t1": "t1", "hada_t2": "t2"}
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class LoHaFormat(PeftFormat):
    """Of pFedPara, the second matrix with its 1 has a rank one higher, and the first a column of zeros."""

    kind, method, tensors = "LOHA", FedPara, tuple(_NAMES)
    settings = (*targets.SETTINGS, "r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save")
    ignored_settings = ("init_weights", "use_effective_conv2d", "rank_dropout", "module_dropout")

    def write(
        self, base: Base, method: FedPara, hosts: Mapping[str, Sequence[HadamardUpdate]]
    ) -> tuple[dict[str, Any], State]:
        check_supported(method.tanh, "tanh in FedPara", "LoHa multiplies the matrices as they are")
        ranks, state = dict[str, int](), State()
        for name, (adapter, *_) in hosts.items():
            host = base.network.get_submodule(name)
            check_layer(host, name, adapter.part, _LAYERS, "LoHa")
            cores = adapter.t1 is not None
            check_supported(cores and adapter.t1 is not None and adapter.t1[0, 0].numel() == 1, f"Cores on {name}",
                   "convolutions of one place have none there; set cores=False")  # fmt: skip
            check_supported(
                cores and method.personalized, f"pFedPara with cores on {name}", "the 1 is of no low rank there"
            )
            own = _shifted(_factors(adapter)) if method.personalized else _factors(adapter)
            state |= {f"{self.prefix}{name}.{key}": value for key, value in _written(own).items()}
            ranks[name] = own["x1"].shape[1]
        rank = most_common(ranks)
        others = by_length({name: r for name, r in ranks.items() if r != rank})
        cores = any(found[0].t1 is not None for found in hosts.values())
        return {
            **targets.written(base, hosts),
            **{"r": rank, "alpha": rank, "rank_pattern": others, "alpha_pattern": others},
            "use_effective_conv2d": cores,
        }, state

    def expected(self, base: Base, file: File) -> Iterator[str]:
        return targets.named(base, file.config)

    def read(self, base: Base, file: File, name: str) -> Iterator[tuple[FedPara, Mapping[str, State]]]:
        groups = defaultdict[tuple[int, bool], dict[str, State]](dict)
        for host, own in file.state.items():
            state = _read(own)
            rank = state["x1"].shape[1] if "x1" in state else file.get("r", 8)
            alpha = targets.by_pattern(file.get("alpha_pattern", {}), host, file.get("alpha", 8))
            if alpha != rank and "x1" in state:
                state["x1"] = state["x1"] * (alpha / rank)
            groups[rank, "t1" in state][joined(base.name, host)] = state
        for number, ((rank, cores), states) in enumerate(groups.items(), 1):
            found, exclude = globs(states, base.model)
            own_name = name if number == 1 else f"{name}_{number}"
            yield FedPara(name=own_name, targets=found, exclude=exclude, rank=rank, cores=cores), states


def check_layer(host: nn.Module, name: str, part: str, kinds: tuple[type[nn.Module], ...], what: str) -> None:
    """Refuse a host of another type, and a part of a host."""
    own = type(host).__name__
    check_supported(
        not isinstance(host, kinds), f"{what} on {name}", f"it adapts {[k.__name__ for k in kinds]}, no {own}"
    )
    check_supported(
        bool(part), f"{what} on the {part} part of {name}", "it has factors for a whole layer; target it by a glob"
    )


def _factors(adapter: HadamardUpdate) -> State:
    return {key: full_tensor(value).detach() for key, value in adapter.state_dict(keep_vars=True).items()}


def _shifted(own: State) -> State:
    """Return factors of one more rank, whose second matrix has the 1 in itself."""
    fill = {"x1": 0.0, "y1": 0.0, "x2": 1.0, "y2": 1.0}
    return {key: torch.cat([own[key], own[key].new_full((len(own[key]), 1), fill[key])], 1) for key in fill}


def _written(own: State) -> State:
    names = {ours: theirs for theirs, ours in _NAMES.items()}
    state = {}
    for key, value in own.items():
        if key in ("t1", "t2"):
            state[names[key]] = value if value.dim() == 4 else value[..., None]
        else:
            state[names[key]] = value if key.startswith("x") and "t1" not in own else value.T
    return state


def _read(own: State) -> State:
    state = {}
    for theirs, value in own.items():
        key = _NAMES[theirs]
        if key in ("t1", "t2"):
            state[key] = value
        else:
            state[key] = value if key.startswith("x") and "hada_t1" not in own else value.T
    return state
