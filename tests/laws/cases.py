"""The table that every law runs over: methods x models, with what each claims."""

import dataclasses
from dataclasses import dataclass

import torch
from models import MODELS, list_of_blocks, logits

import lightning_peft as lp


@dataclass(frozen=True)
class Case:
    model: str
    methods: tuple[lp.Method, ...]
    starts_at_base: bool = True
    mergeable: bool = True

    def __str__(self) -> str:
        return f"{self.model}-{'+'.join(_label(m) for m in self.methods)}"

    @property
    def has_adapters(self) -> bool:
        """Whether something is added to a host; else parameters of the base are all that trains."""
        base_alone = (lp.BitFit, lp.FullFineTuning, lp.OutputLayers, lp.LastLayers)
        return not all(isinstance(m, base_alone) and not getattr(m, "add_missing", False) for m in self.methods)

    @property
    def updates_weights(self) -> bool:
        """Whether an adapter is a `WeightUpdate`."""
        return any(isinstance(m, lp.LoRA | lp.AdaLoRA | lp.FedPara | lp.KronA) for m in self.methods)


FIELDS = ("encoder", "init", "decompose", "tanh", "personalized", "factor", "residual", "bias", "bias_and_scale")


def _label(method: lp.Method) -> str:
    changed = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name in FIELDS}
    extra = [v if isinstance(v, str) else k for k, v in changed.items() if v not in ("kaiming", "random", False, None)]
    extra += ["all"] if getattr(method, "targets", None) == ["all-linear"] else []
    return "-".join([type(method).__name__, *extra])


def methods_for(model: str) -> list[Case]:
    return [*weight_methods(model), *other_methods(model)]


def weight_methods(model: str) -> list[Case]:
    """LoRA and its kin, on the families that differ in layers."""
    if model not in ("bert", "llama", "gpt2", "plain"):
        return [Case(model, (lp.LoRA(rank=4, alpha=6),)), Case(model, (lp.LoRA(rank=3, targets=["all-linear"]),))]
    return [
        Case(model, (lp.LoRA(rank=4, alpha=6),)),
        Case(model, (lp.LoRA(rank=3, targets=["all-linear"]),)),
        Case(model, (lp.LoRA(rank=4, targets=["all-linear"], scaling="rank_stabilized", decompose=True),)),
        Case(model, (lp.LoRA(rank=4, init="pissa"),), starts_at_base=False),
        Case(model, (lp.LoRA(rank=2, init="orthogonal"), lp.LoRA(name="second", rank=2, init="olora")), False),
        Case(model, (lp.AdaLoRA(initial_rank=4, target_rank=2),)),
        Case(model, (lp.FedPara(rank=2),)),
        Case(model, (lp.FedPara(gamma=0.2, tanh=True),)),
        Case(model, (lp.FedPara(rank=3, personalized=True, targets=["attention.query", "feedforward.down"]),)),
        Case(model, (lp.KronA(scale=2),)),
        Case(model, (lp.KronA(scale=2, targets=["all-linear"], factor=4),)),
        Case(model, (lp.BitFit(add_missing=model == "llama"),)),
        Case(model, (lp.FullFineTuning(),)),
        Case(model, (lp.OutputLayers(),)),
        Case(model, (lp.LoRA(rank=2), lp.OwnParameters(targets=["norms"]))),
        Case(model, (lp.LastLayers(count=2),)),
        Case(model, (lp.TrainableTokens(tokens=list(range(3, 50, 2))),)),
    ]


def other_methods(model: str) -> list[Case]:
    """What acts on activations, attention and input embeddings, on every family."""
    return [
        Case(model, (lp.KronABlock(scale=2),), mergeable=False),
        Case(model, (lp.KronABlock(scale=2, residual=True),), starts_at_base=False, mergeable=False),
        *activation_methods(model),
        *attention_methods(model),
        Case(model, (lp.PrefixTuning(length=2, hidden_size=8), lp.ParallelAdapter(size=6)), False, mergeable=False),
        *prompt_methods(model),
    ]


def activation_methods(model: str) -> list[Case]:
    extras = lp.LLaMAAdapter(length=2, train_norms=True, bias_and_scale=True)
    return [
        Case(model, (lp.IA3(),)),
        Case(model, (lp.Bottleneck(size=5),), starts_at_base=False, mergeable=False),
        Case(model, (lp.ParallelAdapter(size=6),), mergeable=False),
        Case(model, (lp.ParallelAdapter(size=6, activation="swish", bias=True),), mergeable=False),
        Case(model, (extras,), mergeable=False),
    ]


def attention_methods(model: str) -> list[Case]:
    return [
        Case(model, (lp.LLaMAAdapter(length=3, layers=2),), mergeable=False),
        Case(model, (lp.PrefixTuning(length=3, hidden_size=16),), starts_at_base=False, mergeable=False),
        Case(model, (lp.PTuningV2(length=4, dropout=0.0),), starts_at_base=False, mergeable=False),
    ]


def prompt_methods(model: str) -> list[Case]:
    prompt = {"targets": ["trunk"], "embeddings": "embed"} if model in ("plain", "encoder") else {}
    if MODELS[model].reads == "images":
        prompt = {
            "targets": [list_of_blocks(MODELS["vit"].make()) if model == "vit" else "*blocks"]
        }  # "blocks" alone is each of them
    together = (lp.LoRA(rank=4), lp.LLaMAAdapter(length=3), lp.PromptTuning(length=2, **prompt), lp.OutputLayers())
    return [
        Case(model, (lp.PromptTuning(length=3, **prompt),), starts_at_base=False, mergeable=False),
        Case(model, (lp.PTuning(length=3, **prompt),), starts_at_base=False, mergeable=False),
        Case(model, (lp.PTuning(length=3, encoder="mlp", hidden_size=8, **prompt),), False, mergeable=False),
        Case(model, (lp.MultitaskPromptTuning(length=3, **prompt),), starts_at_base=False, mergeable=False),
        *([Case(model, together, False, False)] if model in ("bert", "llama", "gpt2", "plain") else []),
    ]


CASES = [case for model in MODELS for case in methods_for(model)]


def adapted(case):
    torch.manual_seed(1)
    return lp.inject(MODELS[case.model](), list(case.methods))


def disturb(model):
    """Give every trained tensor values that matter."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if ".peft." in name else 0.05)
    return model


def call(model, case, padding=None):
    inputs = MODELS[case.model].inputs(padding)
    dtype = next(model.parameters()).dtype
    return logits(model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}))


run = torch.no_grad()(call)
