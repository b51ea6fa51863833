"""``IA3Format``: ``ia3_l`` is l, (out, 1) of outputs and (1, in) of inputs, (1, features, 1...) of convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..methods import IA3
from ..methods.ia3 import Scaling
from ..ops.sharded_tensors import full_tensor
from ..structure.layer_of import layer_of
from ..structure.layer_types import LinearType, TransposedLinearType
from . import targets
from .module_names import exact_globs, join_names
from .peft_format import Base, PeftFile, PeftFormat, StateDict, check_not_torch_attention, check_supported

_SCALES = "ia3_l"


class IA3Format(PeftFormat):
    """``feedforward_modules`` are targets whose inputs are scaled; a host's projections become one vector with ones."""

    kind, method, tensors = "IA3", IA3, (_SCALES,)
    settings = (*targets.SETTINGS, "feedforward_modules", "modules_to_save")
    ignored_settings = ("init_ia3_weights",)

    def to_peft(
        self, base: Base, method: IA3, hosts: Mapping[str, Sequence[Scaling]]
    ) -> tuple[dict[str, Any], StateDict]:
        state = StateDict()
        for name, scalings in hosts.items():
            check_not_torch_attention(scalings[0], name)
            host = base.network.get_submodule(name)
            check_supported(
                not isinstance(host, (nn.Conv2d, nn.Conv3d)) and not isinstance(layer_of(host), LinearType),
                f"IA3 on {name}",
                f"it scales linear layers, Conv2d and Conv3d, no {type(host).__name__}",
            )
            scales = (
                full_tensor(scalings[0].scales)
                if scalings[0].of_inputs
                else torch.stack([s.whole() for s in scalings]).prod(0)
            )
            ones = [1] * (len(layer_of(host).shape(host)) - 2)
            state[f"{self.prefix}{name}.{_SCALES}"] = scales.view(
                *((1, -1, *ones) if scalings[0].of_inputs or ones else (-1, 1))
            )
        inputs = targets.target_settings(base, [n for n, scalings in hosts.items() if scalings[0].of_inputs])
        outputs = targets.target_settings(base, [n for n, scalings in hosts.items() if not scalings[0].of_inputs])
        exclude = [*inputs.get("exclude_modules", []), *outputs.get("exclude_modules", [])]
        transposed = [isinstance(layer_of(base.network.get_submodule(name)), TransposedLinearType) for name in hosts]
        return {
            "target_modules": [*outputs["target_modules"], *inputs["target_modules"]],
            "feedforward_modules": inputs["target_modules"],
            **({"exclude_modules": exclude} if exclude else {}),
            "fan_in_fan_out": any(transposed),
        }, state

    def expected(self, base: Base, file: PeftFile) -> Iterator[str]:
        return targets.target_hosts(base, file.config)

    def from_peft(self, base: Base, file: PeftFile, name: str) -> Iterator[tuple[IA3, Mapping[str, StateDict]]]:
        feedforward = file.get("feedforward_modules", [])
        inputs, outputs = list[str](), list[str]()
        for host in file.state:
            (inputs if targets.ends_like(host, feedforward) else outputs).append(join_names(base.name, host))
        (of_inputs, input_surplus), (of_outputs, output_surplus) = (
            exact_globs(inputs, base.model),
            exact_globs(outputs, base.model),
        )
        states = {
            join_names(base.name, host): {"scales": tensors[_SCALES].flatten()} for host, tensors in file.state.items()
        }
        yield (
            IA3(
                name=name, targets=of_outputs, feedforward_targets=of_inputs, exclude=[*input_surplus, *output_surplus]
            ),
            states,
        )
