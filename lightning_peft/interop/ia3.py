"""(IA)3: ``ia3_l`` is l, (out, 1) of outputs and (1, in) of inputs, (1, features, 1...) of convolutions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..methods import IA3
from ..methods.ia3 import Scaling
from ..ops.sharded_tensors import full_tensor
from ..structure.layer_types import TransposedLinearType, layer_of
from . import targets
from .module_names import globs, joined
from .peft_format import Base, File, PeftFormat, State, check_not_torch_attention

_SCALES = "ia3_l"


class IA3Format(PeftFormat):
    """``feedforward_modules`` are the targets whose inputs are scaled; parts of a host become one vector with ones."""

    kind, method, tensors = "IA3", IA3, (_SCALES,)
    settings = (*targets.SETTINGS, "feedforward_modules", "modules_to_save")
    ignored_settings = ("init_ia3_weights",)

    def write(self, base: Base, method: IA3, hosts: Mapping[str, Sequence[Scaling]]) -> tuple[dict[str, Any], State]:
        state = State()
        for name, found in hosts.items():
            check_not_torch_attention(found[0], name)
            scales = (
                full_tensor(found[0].scales) if found[0].of_inputs else torch.stack([s.whole() for s in found]).prod(0)
            )
            ones = [1] * (len(layer_of(base.network.get_submodule(name)).shape(base.network.get_submodule(name))) - 2)
            state[f"{self.prefix}{name}.{_SCALES}"] = scales.view(
                *((1, -1, *ones) if found[0].of_inputs or ones else (-1, 1))
            )
        inputs = targets.written(base, [n for n, found in hosts.items() if found[0].of_inputs])
        outputs = targets.written(base, [n for n, found in hosts.items() if not found[0].of_inputs])
        exclude = [*inputs.get("exclude_modules", []), *outputs.get("exclude_modules", [])]
        transposed = [isinstance(layer_of(base.network.get_submodule(name)), TransposedLinearType) for name in hosts]
        return {
            "target_modules": [*outputs["target_modules"], *inputs["target_modules"]],
            "feedforward_modules": inputs["target_modules"],
            **({"exclude_modules": exclude} if exclude else {}),
            "fan_in_fan_out": any(transposed),
        }, state

    def expected(self, base: Base, file: File) -> Iterator[str]:
        return targets.named(base, file.config)

    def read(self, base: Base, file: File, name: str) -> Iterator[tuple[IA3, Mapping[str, State]]]:
        inside = file.get("feedforward_modules", [])
        inputs, outputs = list[str](), list[str]()
        for host in file.state:
            (inputs if _scales_inputs(host, inside) else outputs).append(joined(base.name, host))
        (of_inputs, one), (of_outputs, other) = globs(inputs, base.model), globs(outputs, base.model)
        states = {joined(base.name, host): {"scales": own[_SCALES].flatten()} for host, own in file.state.items()}
        yield IA3(name=name, targets=of_outputs, feedforward_targets=of_inputs, exclude=[*one, *other]), states


def _scales_inputs(host: str, pattern: str | Collection[str]) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, host) is not None
    return any(host.endswith(end) for end in pattern)
