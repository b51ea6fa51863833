"""``LLaMAAdapter``: Efficient Fine-tuning of Language Models with Zero-init Attention, https://arxiv.org/abs/2303.16199."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call, parameter_like
from ..core.method import Method, check_setting
from ..ops.kept_result import KeptResult
from ..structure.attention.calls import call_changed
from ..structure.attention.hosts import asks_interface, attention_hosts
from ..structure.attention.key_value import KeyValue, head_count, key_value
from ..structure.selection import select_modules, select_parameters
from .families.bias_and_scale import BiasAndScale


@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter(Method):
    """Lets every query attend to learned prompts through a separate softmax and a gate that starts at zero.

    o = W_o (softmax(q K^T) V + tanh(gate) softmax(q (W_k P)^T) (W_v P)), with P (length, features) and one gate for
    each head. Prompt keys have no positions and every token sees them. At gate zero the model is the base, bit by bit.
    The paper has the gate without tanh; tanh(gate) follows the authors' code. Scores of prompts are computed as those
    of tokens are, scaled and with a softcap (Gemma 2); sinks (gpt-oss) belong to the softmax over tokens alone.

    Args:
        name: Name of the adapters on their hosts, and in files.
        length: Number of prompts K of each layer.
        layers: Number L of attention modules that are adapted, counted from the output; all but the lowest two if not
            given, as the paper's 30 of 32.
        gate_warmup_steps: Number of optimizer steps during which the gates stay at zero, while their gradients enter
            the optimizer's averages, so that the first change of a gate follows many batches and not one.
        targets: Globs of attention modules, or roles.
        heads: Number of query heads, for attention modules that do not tell it.
        train_norms: Whether all normalization layers train too, as in version 2, https://arxiv.org/abs/2304.15010.
        bias_and_scale: Whether the blocks' linear layers become s o (W x + b), as in version 2 (equation 1), with s
            from 1 and b from 0; the authors' code for 65 billion parameters scales the input instead.

    Examples:
        >>> attention = nn.MultiheadAttention(16, num_heads=4, batch_first=True)
        >>> _ = lp.inject(nn.ModuleDict({"attention": attention}), lp.LLaMAAdapter(length=3, targets=["attention"]))
        >>> x = torch.randn(2, 5, 16)
        >>> attention(x, x, x)[0].shape, attention.peft["llama_adapter"].gate.shape  # one gate for each head
        (torch.Size([2, 5, 16]), torch.Size([4]))
    """

    name: str = "llama_adapter"
    length: int = 10
    layers: int | None = None
    gate_warmup_steps: int = 0
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention"])
    heads: int | None = None
    train_norms: bool = False
    bias_and_scale: bool = False

    def __post_init__(self) -> None:
        check_setting(
            isinstance(self.length, int) and self.length > 0, "length", self.length, "a positive whole number"
        )
        for field in ("layers", "heads"):
            value = getattr(self, field)
            check_setting(
                value is None or isinstance(value, int) and value > 0, field, value, "a positive whole number"
            )
        steps = self.gate_warmup_steps
        check_setting(isinstance(steps, int) and steps >= 0, "gate_warmup_steps", steps, "a whole number of steps")

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        hosts = attention_hosts(model, self.targets, (), joins=False)
        layers = self.layers or max(1, len(hosts) - 2)
        check_setting(
            layers <= len(hosts), "layers", layers, f"at most {len(hosts)}, the number of attention modules found"
        )
        for name, host in list(hosts.items())[-layers:]:
            heads = self.heads or head_count(model, name)
            yield name, LLaMAAdapterPrompt(host, key_value(model, name), self.length, heads)
        if self.bias_and_scale:
            for name, host in select_modules(model, ["all-linear"]).items():
                yield name, BiasAndScale(host)

    def parameters(self, model: nn.Module) -> Iterable[str]:
        return select_parameters(model, ["norms"], roles_only=True) if self.train_norms else ()

    def check_run(self, total_steps: int) -> None:
        if 0 <= total_steps <= self.gate_warmup_steps:
            raise ValueError(
                f"gate_warmup_steps={self.gate_warmup_steps}, and the run has {total_steps} optimizer steps: the gates "
                f"would stay at zero, and nothing would change. Give fewer warm-up steps, or train longer."
            )

    def after_step(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> None:
        if step <= self.gate_warmup_steps:
            for adapter in adapters:
                if isinstance(adapter, LLaMAAdapterPrompt):
                    nn.init.zeros_(adapter.gate)

    def metrics(self, adapters: Mapping[str, Adapter]) -> Mapping[str, Tensor]:
        prompts = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, LLaMAAdapterPrompt)}
        gates = {name: adapter.gate.detach().tanh().abs() for name, adapter in prompts.items()}
        return {f"{self.name}/gate/{name}": gate.mean() for name, gate in gates.items()}


class LLaMAAdapterPrompt(Adapter):
    """Prompts (length, features) and gates (heads,) of one attention module.

    Args:
        host: Attention module.
        project: Its key and value projections.
        length: Number of prompts.
        heads: Number of query heads.
    """

    unmergeable = "no weight gives attention to a prompt"
    plot_tensors = {"gates": "gate", "tokens": "prompt"}

    def __init__(self, host: nn.Module, project: KeyValue, length: int, heads: int) -> None:
        super().__init__()
        width, value_width = project.inputs(host)
        if width != value_width:
            raise TypeError(
                f"{type(host).__name__} computes keys of {width} features and values of {value_width}; no prompt has "
                f"both widths. Choose other targets."
            )
        weight = project.weight(host)
        self.project, self.key_width = project, project.outputs(host)[0]
        self.by_interface, self.projected = asks_interface(host), KeptResult()
        self.prompt, self.gate = parameter_like(weight, length, width), parameter_like(weight, heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prompt)
        nn.init.zeros_(self.gate)

    def forward(self, host: nn.Module, inner: Call, *args: Any, **kwargs: Any) -> Any:
        return call_changed(partial(self._attend, host), host, self.by_interface, inner, *args, **kwargs)

    def _attend(self, host: nn.Module, attend: Call, query: Tensor, *rest: Any, **settings: Any) -> Tensor:
        output: Tensor = attend(query, *rest, **settings)
        size, scale = query.shape[-1], settings.get("scale")
        key, value = self._prompts(host, size, size**-0.5 if scale is None else scale)
        return output + self._prompted(query, key, value, settings.get("softcap"))

    def _prompts(self, host: nn.Module, size: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return scaled keys and gated values of the prompts, (heads, length, size) and (heads, length, value size)."""
        compute = partial(self._project, host, size, scale)
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            return compute()
        base = self.project.plain_tensors(host)
        return (
            compute() if base is None else self.projected.get((size, scale), [self.prompt, self.gate, *base], compute)
        )

    def _project(self, host: nn.Module, size: int, scale: float) -> tuple[Tensor, Tensor]:
        key, value = self.project(host, self.prompt)
        length, heads = key.shape[0], self.gate.shape[0]
        key = key.view(length, -1, size).transpose(0, 1)
        value = value.view(length, key.shape[0], -1).transpose(0, 1)
        if key.shape[0] != heads:
            key, value = (x.repeat_interleave(heads // x.shape[0], 0) for x in (key, value))
        # Prompts are few: scaling and gating them costs less than scaling scores and gating weights of all tokens.
        return key * scale, value * torch.tanh(self.gate).view(-1, 1, 1)

    def _prompted(self, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        """Return softmax(q K^T) V for q (batch, heads, tokens, size), with K and V of ``_prompts``."""
        heads, size = key.shape[0], query.shape[-1]
        if query.shape[1] == heads:
            return _attend_to_prompts(query, key, value, softcap)
        kv_heads = self.key_width // size
        if query.shape[1:3] == (kv_heads, heads // kv_heads):  # one token; a group's query heads were given as tokens
            grouped = query.reshape(query.shape[0], heads, -1, size)
            return _attend_to_prompts(grouped, key, value, softcap).reshape_as(query)
        raise ValueError(f"The attention call has {query.shape[1]} heads, the adapter {heads} gates; give heads=....")


def _attend_to_prompts(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
    """Return softmax(q K^T) V (batch, heads, tokens, value size), with K scaled and V gated (heads, length, ...)."""
    # One product for each head over the tokens of all rows: projections have this layout in memory, so no copy is
    # saved. With tokens in the last dimension, a softmax over a few prompts is twenty times as fast on the CPU.
    tokens = query.transpose(0, 1).flatten(1, 2).mT
    scores = torch.bmm(key.to(query.dtype), tokens)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.softmax(1, dtype=torch.float32 if query.element_size() < 4 else query.dtype)
    prompted = torch.bmm(weights.to(query.dtype).mT, value.to(query.dtype))
    return prompted.view(prompted.shape[0], *query.shape[0:3:2], -1).transpose(0, 1)
