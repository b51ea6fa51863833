"""A small Llama on each side: this package, HF peft, adapters where it is installed, and a hand-written form."""

import importlib.util
from collections.abc import Callable
from operator import attrgetter

import hand_written
import hand_written_prompts
import harness
import torch
from hand_written import RANK
from hand_written_prompts import LENGTH
from layer_sides import NO_MORE, SmallCase, filled, low_rank
from sides import called, ours, peer, wrapped
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp

QUERY_VALUE = ("q_proj", "v_proj")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = {"num_virtual_tokens": LENGTH, "task_type": "CAUSAL_LM"}
BLOCKS = attrgetter("num_hidden_layers")
WIDTH, HALF = attrgetter("hidden_size"), lambda config: config.hidden_size // 2
KEYS = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
CASES = low_rank(QUERY_VALUE) | {
    "lora_linears": low_rank(LINEARS)["lora"],
    "ia3": SmallCase(
        ours("IA3"), peer("IA3Config", **KEYS), hand_written.ScaledOutput, ("k_proj", "v_proj", "up_proj")
    ),
    "bitfit": SmallCase(
        ours("BitFit", targets=[*QUERY_VALUE], add_missing=True), None, hand_written.TrainedBias, QUERY_VALUE
    ),
    "bottleneck": SmallCase(
        ours("Bottleneck", size=RANK, **NO_MORE), None, hand_written.Bottleneck, ("o_proj", "down_proj")
    ),
    "prefix_tuning": SmallCase(
        ours("PrefixTuning", length=LENGTH, reparameterize=False),
        peer("PrefixTuningConfig", **TOKENS),
        hand_written_prompts.Prefix,
    ),
    "prompt_tuning": SmallCase(
        ours("PromptTuning", length=LENGTH), peer("PromptTuningConfig", **TOKENS), hand_written_prompts.Prompt
    ),
    "p_tuning": SmallCase(
        ours("PTuning", length=LENGTH, encoder="lstm"),
        peer(
            "PromptEncoderConfig",
            **TOKENS,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=HALF,
            encoder_num_layers=2,
        ),
        hand_written_prompts.EncodedPrompt,
    ),
    "llama_adapter": SmallCase(
        ours("LLaMAAdapter", length=LENGTH, layers=BLOCKS),
        peer("AdaptionPromptConfig", adapter_len=LENGTH, adapter_layers=BLOCKS, task_type="CAUSAL_LM"),
        hand_written_prompts.PromptedAttention,
        ("self_attn",),
    ),
}
MERGEABLE = [name for name, case in CASES.items() if case.targets and name not in ("bottleneck", "llama_adapter")]
# The library adapters 1.3 needs transformers 4.57; where it is installed, it is one more side.
ADAPTERS = {
    "lora": ("LoRAConfig", {"r": RANK, "alpha": 2 * RANK, "attn_matrices": ["q", "v"]}),
    "lora_dropout": (
        "LoRAConfig",
        {"r": RANK, "alpha": 2 * RANK, "attn_matrices": ["q", "v"], "dropout": hand_written.DROPOUT},
    ),
    "ia3": ("IA3Config", {}),
    "bottleneck": ("DoubleSeqBnConfig", {"reduction_factor": 8}),
    "prefix_tuning": ("PrefixTuningConfig", {"prefix_length": LENGTH, "flat": True}),
}
HAS_ADAPTERS = importlib.util.find_spec("adapters") is not None


def small_llama(layers: int, width: int = 64) -> nn.Module:
    sizes = harness.shape(layers, width, 43 * width // 16, max(4, width // 64)) | {"vocab_size": 256}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def model_sides(name: str, build: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Return the adapted model of each side, all from the same base."""
    case, model = CASES[name], build()
    sides = {"ours": lp.inject(model, case.ours(model.config))}
    if case.peer is not None:
        sides["peft"] = called(wrapped(build(), case.peer(model.config)))
    if case.hand is not None:
        sides["hand"] = by_hand(case, build().requires_grad_(False))
    if HAS_ADAPTERS and name in ADAPTERS:
        sides["adapters"] = by_adapters(name, build())
    return {who: filled(side) for who, side in sides.items()}


def by_adapters(name: str, model: nn.Module) -> nn.Module:
    import adapters

    config, settings = ADAPTERS[name]
    adapters.init(model)
    model.add_adapter("measured", config=getattr(adapters, config)(**settings))
    model.train_adapter("measured")
    return model


def by_hand(case: SmallCase, model: nn.Module) -> nn.Module:
    if not case.targets:
        return case.hand(model)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in case.targets:
            setattr(model.get_submodule(parent), child, case.hand(module))
    return model
