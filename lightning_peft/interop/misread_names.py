"""``check_names`` refuses layers that HF PEFT takes for others, or does not adapt, because of what they are called."""

from __future__ import annotations

from collections.abc import Collection

from ..structure.transformers_api import from_config
from ..structure.transformers_loading import renamed_like
from .peft_format import Base, check_supported

# What HF PEFT turns into target_parameters where transformers 5 fuses experts, by the model whose rules transformers
# applies. It goes by the end of a name, and so takes shared experts and dense blocks for experts, too.
_OF_EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # whose kernels read weights of these names:
_READ = ("out_proj", "conv1d")


def check_names(base: Base, hosts: Collection[str], experts: bool) -> None:
    """Raise where HF PEFT would not adapt one of these layers.

    Args:
        base: Base model.
        hosts: Names of adapted layers.
        experts: Whether HF PEFT looks for experts under the method.
    """
    kind, ends = type(base.network).__name__, {host: host.rpartition(".")[2] for host in hosts}
    of_experts = _OF_EXPERTS.get(renamed_like(base.network) or "", ()) if experts else ()
    if taken := [host for host, end in ends.items() if end in of_experts]:
        reason = "it takes layers of these names for the fused experts and leaves out others"
        check_supported(True, f"LoRA on {', '.join(taken[:2])} of {kind}", reason)
    if from_config(base.network, "model_type") in _MAMBA:
        read = [host for host, end in ends.items() if end in _READ]
        check_supported(bool(read), f"An update of {', '.join(read[:2])} of {kind}", "it refuses these layers of Mamba")
