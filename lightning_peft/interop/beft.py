"""BEFT, which is BitFit where layers have no bias: ``beft_bias`` is the added bias (1, out)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..methods import BitFit
from ..methods.bitfit import AddedBias
from ..ops.sharded_tensors import full_tensor
from . import targets
from .module_names import globs, joined
from .peft_format import Base, File, PeftFormat, State, check_supported

_BIAS = "beft_bias"


class BEFTFormat(PeftFormat):
    """Biases that layers have of their own train in place here, and have no tensor there."""

    kind, method, tensors = "BEFT", BitFit, (_BIAS,)
    settings = (*targets.SETTINGS, "modules_to_save")
    ignored_settings = ("init_weights",)

    def write(
        self, base: Base, method: BitFit, hosts: Mapping[str, Sequence[AddedBias]]
    ) -> tuple[dict[str, Any], State]:
        state = State()
        for name, (adapter, *_) in hosts.items():
            host = base.network.get_submodule(name)
            check_supported(
                not isinstance(host, nn.Linear), f"A bias on {name}", f"it has none for {type(host).__name__}"
            )
            state[f"{self.prefix}{name}.{_BIAS}"] = full_tensor(adapter.bias).detach()[None]
        return targets.written(base, hosts), state

    def expected(self, base: Base, file: File) -> Iterator[str]:
        return targets.named(base, file.config)

    def read(self, base: Base, file: File, name: str) -> Iterator[tuple[BitFit, Mapping[str, State]]]:
        own = [host for host in file.state if getattr(base.network.get_submodule(host), "bias", None) is not None]
        check_supported(bool(own), f"A bias beside that of {', '.join(own[:2])}", "BitFit trains the layer's own one")
        states = {joined(base.name, host): {"bias": state[_BIAS].flatten()} for host, state in file.state.items()}
        found, exclude = globs(states, base.model)
        check_supported(
            bool(exclude), f"Biases on {', '.join(found)} without {', '.join(exclude)}", "BitFit leaves none out"
        )
        yield BitFit(name=name, targets=found, add_missing=True), states
