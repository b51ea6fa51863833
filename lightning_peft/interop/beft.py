"""``BEFTFormat``: peft's BEFT is our BitFit where layers have no bias; ``beft_bias`` is the added bias (1, out)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..methods import BitFit
from ..methods.bitfit import AddedBias
from ..ops.sharded_tensors import full_tensor
from . import targets
from .module_names import exact_globs, join_names
from .peft_format import Base, PeftFile, PeftFormat, StateDict, check_supported

_BIAS = "beft_bias"


class BEFTFormat(PeftFormat):
    """Files hold added biases alone; a bias that a layer has already trains in place here and has no tensor there."""

    kind, method, tensors = "BEFT", BitFit, (_BIAS,)
    settings = (*targets.SETTINGS, "modules_to_save")
    ignored_settings = ("init_weights",)

    def to_peft(
        self, base: Base, method: BitFit, hosts: Mapping[str, Sequence[AddedBias]]
    ) -> tuple[dict[str, Any], StateDict]:
        state = StateDict()
        for name, (adapter, *_) in hosts.items():
            host = base.network.get_submodule(name)
            check_supported(
                not isinstance(host, nn.Linear), f"A bias on {name}", f"it has none for {type(host).__name__}"
            )
            state[f"{self.prefix}{name}.{_BIAS}"] = full_tensor(adapter.bias).detach()[None]
        return targets.target_settings(base, hosts), state

    def expected(self, base: Base, file: PeftFile) -> Iterator[str]:
        return targets.target_hosts(base, file.config)

    def from_peft(self, base: Base, file: PeftFile, name: str) -> Iterator[tuple[BitFit, Mapping[str, StateDict]]]:
        biased = [host for host in file.state if getattr(base.network.get_submodule(host), "bias", None) is not None]
        check_supported(
            bool(biased), f"A bias beside that of {', '.join(biased[:2])}", "BitFit trains the layer's own one"
        )
        states = {join_names(base.name, host): {"bias": state[_BIAS].flatten()} for host, state in file.state.items()}
        patterns, exclude = exact_globs(states, base.model)
        check_supported(
            bool(exclude), f"Biases on {', '.join(patterns)} without {', '.join(exclude)}", "BitFit leaves none out"
        )
        yield BitFit(name=name, targets=patterns, add_missing=True), states
