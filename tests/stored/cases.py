"""What was injected into which model before its files were stored, and how the outputs were computed."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import lightning_peft as lp


@dataclass(frozen=True)
class Call:
    """A way to call the adapted model: with these adapters active, or with these tasks of the rows."""

    active: tuple[str, ...] | None = None
    tasks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """One stored folder.

    Args:
        model: Name of the model in ``stored.models``.
        methods: What ``lp.inject`` gets.
        also_train: As well.
        build: In place of both, where more is done.
        calls: Ways to call the model, each with outputs of its own.
        trains: Whether there is a checkpoint as well.
        with_pseudo: Whether rows have pseudo tokens.
        scale: Factor of the adapters' values, so that what they do is seen in the outputs.
    """

    model: str
    methods: tuple[lp.Method, ...] = ()
    also_train: tuple[str, ...] = ()
    build: Callable[[nn.Module], object] | None = None
    calls: tuple[Call, ...] = (Call(),)
    trains: bool = False
    with_pseudo: bool = False
    scale: float = 1.0

    def inject(self, model: nn.Module) -> None:
        if self.build is None:
            lp.inject(model, list(self.methods), list(self.also_train))
        else:
            self.build(model)


def two_names(model: nn.Module) -> None:
    """Two adapters that were added beside each other, of which the first takes part."""
    lp.add_adapter(model, lp.LoRA(rank=2), "first")
    lp.add_adapter(model, [lp.IA3(), lp.LoRA(rank=1, targets=["fc1"])], "second", also_train=["head"])
    lp.activate(model, "first")


PROMPT = {"targets": ["trunk"], "embeddings": "embed"}
TASKS = (Call(tasks=(0, 1)), Call(tasks=(1, 0)))
NAMES = tuple(Call(active=names) for names in (("second",), ("first", "second"), ("second", "first"), ("first",)))
LINEAR = ["all-linear"]
CASES = {
    "lora": Case("plain", (lp.LoRA(rank=2),), trains=True),
    "lora_head": Case("bert", (lp.LoRA(rank=2),), ("classifier", "1.output.LayerNorm.bias"), trains=True),
    "lora_bias_only_glob": Case("plain", (lp.LoRA(rank=1, targets=["fc?"], exclude=["trunk.0.*"]),), ("norm",)),
    "lora_patterns": Case(
        "plain",
        (lp.LoRA(rank=2, targets=LINEAR, rank_pattern={"fc1": 1, "0.fc2": 3}, alpha_pattern={"v_proj": 3}),),
    ),
    "lora_fused_rows": Case("gpt2", (lp.LoRA(rank=1),), trains=True),
    "lora_fused_whole": Case("gpt2", (lp.LoRA(rank=2, targets=["c_attn"]),)),
    "lora_read_weight": Case("encoder", (lp.LoRA(rank=2),)),
    "lora_read_weight_all_linear": Case("encoder", (lp.LoRA(rank=1, targets=LINEAR),)),
    "lora_convolution_embedding": Case("convolutions", (lp.LoRA(rank=2, targets=["first", "second", "embed"]),)),
    "lora_pissa": Case("plain", (lp.LoRA(rank=1, init="pissa", targets=["q_proj"]),), trains=True),
    "lora_olora": Case("plain", (lp.LoRA(rank=2, init="olora"),)),
    "lora_orthogonal": Case("plain", (lp.LoRA(rank=2, init="orthogonal", scaling="rank_stabilized"),)),
    "dora": Case("llama", (lp.LoRA(rank=1, alpha=3, decompose=True, targets=["attention.value"]),), trains=True),
    "dora_fused_rows": Case("gpt2", (lp.LoRA(rank=1, decompose=True, scaling="rank_stabilized"),)),
    "dora_read_weight": Case("encoder", (lp.LoRA(rank=1, decompose=True),)),
    "lora_int8": Case("plain-int8", (lp.LoRA(rank=1, alpha=4, targets=LINEAR),)),
    "lora_nf4": Case("plain-nf4", (lp.LoRA(rank=1, targets=["fc1"]),), trains=True),
    "adalora": Case("llama", (lp.AdaLoRA(initial_rank=3, target_rank=2, exclude=["mlp"]),)),
    "adalora_trained": Case(
        "plain",
        (lp.AdaLoRA(initial_rank=2, target_rank=1, warmup_steps=0, final_steps=1, interval=1, targets=["q_proj"]),),
        trains=True,
    ),
    "adalora_fused_rows": Case("gpt2", (lp.AdaLoRA(targets=["attention.query"], initial_rank=2, target_rank=1),)),
    "fedpara": Case("plain", (lp.FedPara(rank=2, targets=["fc1"], jacobian_weight=0.1),), trains=True, scale=4),
    "fedpara_gamma_tanh": Case("plain", (lp.FedPara(gamma=0.2, tanh=True, targets=["v_proj"]),), scale=4),
    "fedpara_convolution": Case("convolutions", (lp.FedPara(rank=2, targets=["first", "second"]),), scale=4),
    "fedpara_convolution_flat": Case("convolutions", (lp.FedPara(rank=2, cores=False, targets=["first"]),), scale=4),
    "fedpara_fused_rows": Case("gpt2", (lp.FedPara(rank=1, targets=["attention.value"]),), scale=4),
    "pfedpara": Case("plain", (lp.FedPara(rank=1, personalized=True, targets=["q_proj", "fc2"]),), scale=4),
    "krona": Case("plain", (lp.KronA(scale=2),)),
    "krona_all_linear": Case("llama", (lp.KronA(targets=LINEAR, factor=4),)),
    "krona_shape": Case("encoder", (lp.KronA(shape_a=[8, 2], targets=["attention.value"]),)),
    "krona_convolution": Case("convolutions", (lp.KronA(targets=["first"]),)),
    "krona_block": Case("plain", (lp.KronABlock(scale=2),)),
    "krona_block_residual": Case("bert", (lp.KronABlock(residual=True),), trains=True),
    "ia3": Case("plain", (lp.IA3(),), trains=True),
    "ia3_gated": Case("llama", (lp.IA3(),)),
    "ia3_fused_rows": Case("gpt2", (lp.IA3(),)),
    "ia3_read_weight": Case("encoder", (lp.IA3(),)),
    "bottleneck": Case("bert", (lp.Bottleneck(size=2),)),
    "bottleneck_read_weight": Case("encoder", (lp.Bottleneck(size=2, train_norms=False, activation="relu"),)),
    "parallel_adapter": Case("plain", (lp.ParallelAdapter(size=2),)),
    "parallel_adapter_bias": Case("llama", (lp.ParallelAdapter(size=2, activation="swish", bias=True),)),
    "prefix_tuning": Case("gpt2", (lp.PrefixTuning(length=2, hidden_size=3),), trains=True),
    "prefix_tuning_plain": Case("t5", (lp.PrefixTuning(length=2, reparameterize=False),)),
    "prefix_tuning_shifted": Case("llama", (lp.PrefixTuning(length=2, hidden_size=3, shift_positions=True),)),
    "p_tuning_v2": Case("bert", (lp.PTuningV2(length=2, dropout=0.0),)),
    "llama_adapter": Case("llama", (lp.LLaMAAdapter(length=2, layers=1, gate_warmup_steps=1),), trains=True),
    "llama_adapter_v2": Case("plain", (lp.LLaMAAdapter(length=2, layers=2, train_norms=True, bias_and_scale=True),)),
    "llama_adapter_read_weight": Case("encoder", (lp.LLaMAAdapter(length=2, layers=2),)),
    "prompt_tuning": Case("llama", (lp.PromptTuning(length=2),), trains=True),
    "prompt_tuning_tasks": Case("plain", (lp.PromptTuning(length=2, tasks=2, **PROMPT),), calls=TASKS),
    "prompt_tuning_t5": Case("t5", (lp.PromptTuning(length=2, init="vocabulary"),)),
    "p_tuning": Case("bert", (lp.PTuning(length=2),)),
    "p_tuning_mlp": Case("plain", (lp.PTuning(length=2, encoder="mlp", hidden_size=3, **PROMPT),), trains=True),
    "p_tuning_template": Case("llama", (lp.PTuning(template="[P:2] {word} [P] {mask}"),), with_pseudo=True),
    "multitask_prompt_tuning": Case("llama", (lp.MultitaskPromptTuning(length=2, tasks=2),), calls=TASKS),
    "multitask_prompt_tuning_one": Case("gpt2", (lp.MultitaskPromptTuning(length=2),)),
    "bitfit": Case("bert", (lp.BitFit(),)),
    "bitfit_add_missing": Case("llama", (lp.BitFit(add_missing=True, targets=["o_proj"]),), trains=True),
    "full_fine_tuning": Case("convolutions", (lp.FullFineTuning(),)),
    "output_layers": Case("llama", (lp.OutputLayers(),)),
    "last_layers": Case("plain", (lp.LastLayers(count=1),)),
    "own_parameters": Case("plain", (lp.OwnParameters(targets=["norms", "head"]),), trains=True),
    "mix_and_match": Case("bert", (lp.PrefixTuning(length=2, hidden_size=3), lp.ParallelAdapter(size=2))),
    "four_methods": Case(
        "plain",
        (lp.LoRA(rank=1), lp.LLaMAAdapter(length=1), lp.PromptTuning(length=1, **PROMPT), lp.OutputLayers()),
        trains=True,
    ),
    "two_of_one_method": Case("llama", (lp.LoRA(rank=2), lp.LoRA(name="outer", rank=1, alpha=3))),
    "two_names": Case("plain", build=two_names, calls=NAMES, trains=True),
}
