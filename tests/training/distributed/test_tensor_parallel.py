"""Tensor parallelism over two processes: every method gives the single process's numbers, or is refused by name."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from cases import Case, methods_for
from models import MODELS, logits
from processes import together
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import lightning_peft as lp
from lightning_peft.core.injection_record import adapters_of
from lightning_peft.core.tensor_parallel import reduce_partial_gradients
from lightning_peft.quantization.quantize import quantize
from lightning_peft.training.distributed.tensor_parallel import parallelize
from lightning_peft.training.optimizer_steps import add_gradient

CASES = [
    *methods_for("llama"),
    Case("llama", (lp.LoRA(name="stable", rank=4, scaling="rank_stabilized"),)),
    Case("llama", (lp.LoRA(name="dropped", rank=4, dropout=0.1),)),
    Case("llama", (lp.IA3(name="inner", targets=["o_proj"], feedforward_targets=["down_proj"]),)),
    Case("llama", (lp.FedPara(name="observed", rank=2, jacobian_weight=0.1),)),
    Case("llama", (lp.ParallelAdapter(name="whole", size=6, targets=["mlp"]),), mergeable=False),
    Case("llama", (lp.Bottleneck(name="whole", size=5, targets=["self_attn", "mlp"]),), mergeable=False),
    Case("llama", (lp.LoRA(name="everywhere", rank=2, alpha=2, targets=["all-linear", "lm_head"]), lp.LastLayers())),
    Case("vit", (lp.LoRA(name="stable", rank=4), lp.OutputLayers())),
]
REFUSED = ("AdaLoRA", "LLaMAAdapter", "OwnParameters", "PrefixTuning", "PTuningV2", "TrainableTokens", "dropped")
WAYS = ("inject, split", "split, inject")


def refused(case):
    return any(method.name in REFUSED or type(method).__name__ in REFUSED for method in case.methods)


def adapted(case, way):
    """Return an adapted and split model with values that matter, or why it is refused; processes start apart."""
    torch.manual_seed(1 + torch.distributed.get_rank())
    model, mesh = MODELS[case.model](), init_device_mesh("cpu", (2,))
    steps = {"inject": lambda: lp.inject(model, list(case.methods)), "split": lambda: parallelize(model, mesh)}
    for step in way.split(", "):
        before = {name: type(module) for name, module in model.named_modules()}
        kinds = [type(p) for p in model.parameters()]
        try:
            steps[step]()
        except TypeError as error:
            assert before == {name: type(module) for name, module in model.named_modules()}
            assert kinds == [type(p) for p in model.parameters()]
            return str(error)
    disturb(model)
    return model


def single(case, split):
    """Return a whole model with the values of a split one."""
    model = lp.inject(MODELS[case.model](), list(case.methods))
    result = model.load_state_dict(values(split), strict=False)
    assert not result.unexpected_keys
    return model


def values(model):
    """Return whole values of what trains, and of adapters' buffers, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: whole(t) for n, t in named if t.requires_grad or ".peft." in n}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@torch.no_grad()
def disturb(model):
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        noise = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
        parameter.add_(noise, alpha=0.1)


@torch.no_grad()
def run(model, case):
    return logits(model(**MODELS[case.model].inputs()))


def trained(model, case, steps=2):
    """Train for some steps; return outputs, losses, the first gradients and the last values."""
    record = {"first outputs": run(model.eval(), case)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        out = logits(model(**MODELS[case.model].inputs())).flatten(0, -2)
        loss = F.cross_entropy(out, torch.arange(len(out)) % 3)
        loss.backward()
        for method in case.methods:
            penalty = method.penalty(list(adapters_of(model, method).values()))
            if penalty is not None:
                add_gradient(penalty, optimizer)
        reduce_partial_gradients(model.parameters())
        record[f"loss {step}"] = loss.detach()
        if step == 0:
            record |= {f"gradient of {n}": whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    return record | {f"trained {n}": v for n, v in values(model).items()} | {"outputs": run(model.eval(), case)}


def held(model):
    """The values that this process holds."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (p.to_local() if isinstance(p, DTensor) else p).clone() for name, p in own.items()}


def compare(case, way):
    """Return the largest difference of anything, and of what; or the message of a refusal, which changed nothing."""
    split = adapted(case, way)
    if isinstance(split, str):
        return split
    whole_one = single(case, split)
    found, expected = trained(split, case), trained(whole_one, case)
    if case.mergeable and all(".peft." in name for name, p in split.named_parameters() if p.requires_grad):
        before, outputs = held(split), run(split, case)
        found["merged for a while"] = run(lp.merge(split, keep=True), case)
        after = held(lp.unmerge(split))
        assert all(torch.equal(own, after[name]) for name, own in before.items())
        assert torch.equal(run(split, case), outputs)
        expected["merged for a while"] = run(lp.merge(copy.deepcopy(whole_one)), case)
    if case.mergeable:
        found["merged"] = run(lp.merge(split), case)
        expected["merged"] = run(lp.merge(whole_one), case)
    assert found.keys() == expected.keys()
    return max((float((found[key] - value).abs().max()), key) for key, value in expected.items())


def compare_all(way):
    torch.distributed.init_process_group("gloo")
    return {f"{case}-{case.methods[0].name}": compare(case, way) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_method_computes_and_trains_the_same_or_is_refused(way):
    first, second = together(compare_all, way)
    assert len(first) == len(CASES)
    messages = {name: found for name, found in first.items() if isinstance(found, str)}
    assert messages.keys() == {f"{case}-{case.methods[0].name}" for case in CASES if refused(case)}, messages
    for message in messages.values():
        assert "does not run under tensor parallelism" in message or "has dropout" in message
    largest = {name: max(found, second[name]) for name, found in first.items() if name not in messages}
    print(*(f"{name}, {way}: {value:.1e}, {of}" for name, (value, of) in largest.items()), sep="\n")
    assert {name: found for name, found in largest.items() if not found[0] < 1e-5} == {}


def mesh(size):
    """Return all that is asked of a mesh before a refusal."""
    return types.SimpleNamespace(size=lambda: size)


REFUSALS = {
    "bert": "attention.self holds .*query and no attention.output",
    "gpt2": "c_attn computes query, key and value at once",
    "t5": "SelfAttention has relative_attention_bias",
    "bart": r"encoder.layers.0 has self_attn",
    "distilbert": "DistilBert(SelfAttention. does not go by head_dim|SdpaAttention. reads find_pruneable_heads)",
    "encoder": "layers.0 holds trunk.layers.0.self_attn and no attention.output",
    "fused_vit": "qkv computes query, key and value at once",
    "plain": "Attention. reads num_heads",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_models_of_another_make_are_refused_by_the_part_that_does_not_fit(name):
    model = MODELS[name]()
    with pytest.raises(TypeError, match=REFUSALS[name]):
        parallelize(model, mesh(2))
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def no_output(model):
    del model.model.layers[1].self_attn.o_proj


def norm_inside(model):
    model.model.layers[1].self_attn.q_norm = nn.RMSNorm(32, elementwise_affine=False)


def fused_up(model):
    model.model.layers[2].mlp.up_proj = nn.Linear(32, 96)


def tied(model):
    layers = model.model.layers
    layers[0].mlp.up_proj.weight = layers[1].mlp.up_proj.weight


def quantized(model):
    quantize(model, "int8")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (no_output, "layers.1.self_attn holds .*q_proj and no attention.output"),
        (norm_inside, "layers.1.self_attn has q_norm, which would act on a part"),
        (fused_up, "layers.2.mlp.up_proj returns 96 features for .*down_proj's 48"),
        (tied, "layers.0.mlp.up_proj shares a parameter"),
        (quantized, "q_proj is a .*, not a plain nn.Linear"),
    ],
)
def test_a_llama_with_something_else_in_it_is_refused(change, match):
    model = MODELS["llama"]()
    change(model)
    with pytest.raises(TypeError, match=match):
        parallelize(model, mesh(2))


def test_heads_and_features_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="q_proj computes 4 heads, which 3 processes cannot share equally"):
        parallelize(MODELS["llama"](), mesh(3))
    with pytest.raises(ValueError, match="k_proj computes 2 heads, which 4 processes"):
        parallelize(MODELS["llama"](), mesh(4))


def test_a_model_without_the_roles_is_refused():
    with pytest.raises(TypeError, match="Sequential has no layers of attention.query"):
        parallelize(nn.Sequential(nn.Linear(4, 4)), mesh(2))
