"""``LLaMAAdapterFormat``: ``adaption_prompt`` is P (1, length, features), ``adaption_gate`` one factor without tanh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..checkpoints.adapter_state import strip_wrapper_names
from ..methods import LLaMAAdapter
from ..methods.llama_adapter import LLaMAAdapterPrompt
from ..ops.sharded_tensors import full_tensor
from ..structure.attention.key_value import head_count
from ..structure.transformers_api import from_config
from .module_names import exact_globs, join_names
from .peft_format import Base, PeftFile, PeftFormat, StateDict, check_supported

_PROMPT, _GATE = "adaption_prompt", "adaption_gate"
_MODELS = ("llama", "mistral")  # of those that peft knows, the ones that compute prompts as the paper does


class LLaMAAdapterFormat(PeftFormat):
    """One gate for all heads of a layer, as a bare factor; here it is tanh(gate) for each head."""

    kind, method, tensors = "ADAPTION_PROMPT", LLaMAAdapter, (_PROMPT, _GATE)
    settings = ("target_modules", "adapter_len", "adapter_layers")

    def to_peft(
        self, base: Base, method: LLaMAAdapter, hosts: Mapping[str, Sequence[LLaMAAdapterPrompt]]
    ) -> tuple[dict[str, Any], StateDict]:
        check_supported(method.bias_and_scale, "bias_and_scale", "it has no scales and biases")
        kind = from_config(base.network, "model_type")
        check_supported(
            kind not in (*_MODELS, "gpt2"), f"LLaMAAdapter on {kind}", f"it adapts {' and '.join(_MODELS)} alone"
        )
        state = StateDict()
        for name, (adapter, *_) in hosts.items():
            _check_attention(base, name)
            gates = full_tensor(adapter.gate).detach()
            check_supported(
                bool((gates != gates[0]).any()), f"The gates at {name}", "it has one for all heads of a layer"
            )
            state[f"{self.prefix}{name}.{_PROMPT}"] = full_tensor(adapter.prompt).detach()[None]
            state[f"{self.prefix}{name}.{_GATE}"] = gates[:1].tanh()
        suffixes = {name.rpartition(".")[2] for name in hosts}
        attentions = [
            strip_wrapper_names(n) for n, _ in base.network.named_modules() if n.rpartition(".")[2] in suffixes
        ]
        check_supported(len(suffixes) > 1 or list(hosts) != attentions[-len(hosts) :], f"Prompts at {', '.join(hosts)}",
               "it adapts the last layers of a model")  # fmt: skip
        return {"target_modules": suffixes.pop(), "adapter_len": method.length, "adapter_layers": len(hosts)}, state

    def expected(self, base: Base, file: PeftFile) -> Iterator[str]:
        suffix = file.get("target_modules", "self_attn")
        attentions = [name for name, _ in base.network.named_modules() if name == suffix or name.endswith(f".{suffix}")]
        yield from attentions[-file.get("adapter_layers", len(attentions)) :]

    def from_peft(
        self, base: Base, file: PeftFile, name: str
    ) -> Iterator[tuple[LLaMAAdapter, Mapping[str, StateDict]]]:
        states, length = dict[str, StateDict](), file.get("adapter_len", 10)
        for host, tensors in file.state.items():
            _check_attention(base, host)
            if len(tensors) != len(self.tensors):
                raise ValueError(f"The file has {sorted(tensors)} of {host}, expected {', '.join(self.tensors)}.")
            gate = tensors[_GATE]
            check_supported(bool((gate.abs() >= 1).any()), f"The gate {gate.item():g} at {host}", "tanh stays below 1")
            heads = head_count(base.network, host)
            gates = torch.atanh(gate.double()).to(gate.dtype).expand(heads)
            states[join_names(base.name, host)] = {"prompt": tensors[_PROMPT][0], "gate": gates}
        patterns, _ = exact_globs(states, base.model)
        yield LLaMAAdapter(name=name, length=length, layers=len(states), targets=patterns), states


def _check_attention(base: Base, name: str) -> None:
    children = {child for child, _ in base.network.get_submodule(name).named_children()}
    check_supported(not children >= {"q_proj", "k_proj", "v_proj", "o_proj"}, f"Prompts at {name}",
           "it computes them otherwise than LLaMA-Adapter does, where an attention is not Llama's")  # fmt: skip
