"""Experts in 4 and 8 bits: bytes, values, gradients, and the way back."""

import copy
import pickle

import pytest
import torch
from expert_models import EXPERTS, batch, expert_model, implementations
from installed import needs
from models import BEFORE_5
from torch import nn

import lightning_peft as lp
from lightning_peft.analysis.memory_plan import plan_memory
from lightning_peft.core.fingerprint import fingerprint
from lightning_peft.quantization.meta_quantize import quantize_shapes
from lightning_peft.structure.expert_layers import expert_modules, expert_weights
from lightning_peft.structure.quantized_experts import QuantizedExperts

pytestmark = [
    needs("torchao"),
    pytest.mark.skipif(BEFORE_5, reason="experts are modules before transformers 5"),
]
BOTH = ["experts.up", "experts.down"]


def stored_bytes(model, part=""):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(x.nbytes for name, x in tensors.items() if part in name)


def parts(model):
    return [(model.get_submodule(name), part) for name in expert_modules(model)
            for part in expert_weights(model.get_submodule(name))]  # fmt: skip


def test_a_tiny_mixtral_takes_4_and_8_bits_for_each_value_of_its_experts():
    model = expert_model("mixtral")
    before, values = stored_bytes(model, "experts."), 2 * 4 * (48 * 32 + 32 * 24)
    assert before == 4 * values
    nf4 = lp.quantize(copy.deepcopy(model), "nf4", backend="torchao")
    # codes; 8 bits for each 64 values; 3 factors and a mean in 32 bits for each expert; 16 values of the codebook
    assert stored_bytes(nf4, "experts.") == values // 2 + values // 64 + 2 * 2 * 4 * (3 + 1) * 4 + 2 * 2 * 16 * 4
    int8 = lp.quantize(copy.deepcopy(model), "int8")
    assert stored_bytes(int8, "experts.") == values + 2 * 4 * (48 + 32) * 4
    assert [type(m).__name__ for m in nf4.modules()].count("MixtralExperts") == 2
    assert stored_bytes(nf4) < 0.35 * stored_bytes(model)


@pytest.mark.parametrize("name", EXPERTS)
def test_int8_has_a_scale_for_each_output_of_each_expert(name):
    model = expert_model(name)
    expected = {}
    for host, part in parts(model):
        weight = host.get_parameter(part).detach().double()
        weight = weight.mT if EXPERTS[name] else weight
        scale = weight.abs().amax(2, keepdim=True) / 127
        expected[host, part] = (weight / scale).round() * scale
    for (host, part), weight in zip(expected, expected.values(), strict=True):
        assert part in host._parameters
        assert weight.shape[0] == 4
    lp.quantize(model, "int8", targets=BOTH)
    for (host, part), weight in expected.items():
        for expert in range(4):
            found = expert_weights(host)[part].read(host, expert)
            torch.testing.assert_close(found.double(), weight[expert], atol=1e-5, rtol=1e-4)


def test_nf4_stores_each_expert_as_a_layer_of_its_own():
    from lightning_peft.structure.quantized import layer_of

    for name in ("mixtral", "gpt_oss"):
        model = expert_model(name)
        layers = {}
        for host, part in parts(model):
            for expert, weight in enumerate(host.get_parameter(part).detach()):
                layer = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
                layer[0].weight.data = weight.clone()
                lp.quantize(layer, "nf4", targets=["0"], backend="torchao")
                layers[host, part, expert] = layer_of(layer[0]).read(layer[0])
        lp.quantize(model, "nf4", targets=BOTH)
        for (host, part, expert), weight in layers.items():
            found = expert_weights(host)[part].read(host, expert)
            assert torch.equal(found.T if EXPERTS[name] else found, weight)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("name", "implementation"), implementations())
def test_outputs_and_gradients_are_those_of_the_decoded_weights(name, implementation, kind):
    model = lp.quantize(expert_model(name, implementation), kind, targets=BOTH)
    decoded = copy.deepcopy(model)
    error = lp.dequantize(decoded)
    assert {"nf4": 0.05, "int8": 0.002}[kind] < error < {"nf4": 0.15, "int8": 0.02}[kind]
    assert not any(isinstance(module, QuantizedExperts) for module in decoded.modules())
    assert torch.equal(model(batch()).logits, decoded(batch()).logits)
    method = lp.LoRA(targets=[*BOTH, "q_proj" if name != "deepseek_v3" else "o_proj"], rank=3)
    for net in (lp.inject(model, method), lp.inject(decoded, method)):
        torch.manual_seed(0)
        for *_, adapter in lp.adapters(net):
            nn.init.normal_(adapter.a, std=0.3)
            nn.init.normal_(adapter.b, std=0.3)
        net(batch()).logits.square().sum().backward()
    torch.testing.assert_close(model(batch()).logits, decoded(batch()).logits, atol=1e-5, rtol=1e-5)
    expected = {n: p.grad for n, p in decoded.named_parameters() if p.requires_grad}
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[n], atol=1e-4 * expected[n].abs().max().item(), rtol=1e-4)


def test_no_decoded_weight_is_saved_for_backward():
    model = lp.inject(lp.quantize(expert_model("mixtral", "grouped_mm"), "nf4", targets=BOTH), lp.LoRA(targets=BOTH))
    weights = {w.shape(host) for host, part in parts(model) for w in [expert_weights(host)[part]]}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        model(batch()).logits.sum().backward()
    assert saved
    for shape in weights:
        assert not [s for s in saved if len(s) == 3 and s[1:] in (shape, shape[::-1])]


def test_a_quantized_base_is_merged_after_it_is_decoded(capsys):
    model = lp.inject(lp.quantize(expert_model("gpt_oss"), "nf4"), lp.LoRA(targets=["all-linear"], rank=2))
    for *_, adapter in lp.adapters(model):
        nn.init.normal_(adapter.b, std=0.2)
    live = model(batch()).logits
    with pytest.raises(TypeError, match="is quantized"):
        lp.merge(model)
    lp.merge(model, dequantize=True)
    torch.testing.assert_close(model(batch()).logits, live, atol=2e-5, rtol=2e-5)
    assert type(model.model.layers[0].mlp.experts) is type(expert_model("gpt_oss").model.layers[0].mlp.experts)


def test_dequantizing_under_an_adapter_keeps_it():
    model = lp.inject(lp.quantize(expert_model("mixtral"), "int8"), lp.LoRA(targets=BOTH, rank=2))
    for *_, adapter in lp.adapters(model):
        nn.init.normal_(adapter.b, std=0.2)
    live = model(batch()).logits
    lp.dequantize(model)
    torch.testing.assert_close(model(batch()).logits, live, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_copies_and_pickles_are_quantized_too(adapted):
    model = lp.quantize(expert_model("mixtral"), "nf4", targets=BOTH)
    if adapted:
        lp.inject(model, lp.LoRA(targets=BOTH, rank=2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(batch()).logits, model(batch()).logits)
        assert stored_bytes(other) == stored_bytes(model)


def test_casting_keeps_the_statistics_and_computes_in_the_new_type():
    model = lp.quantize(expert_model("mixtral", "grouped_mm"), "nf4").bfloat16()
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj_factor.dtype == torch.float32
    assert experts.factor("gate_up_proj").dtype == torch.bfloat16
    assert model(batch()).logits.dtype == torch.bfloat16


def test_an_adapter_of_either_base_belongs_to_the_other(tmp_path):
    plain = lp.inject(expert_model("mixtral"), lp.LoRA(targets=BOTH, rank=2))
    lp.save_adapter(plain, tmp_path / "adapter")
    quantized = lp.quantize(expert_model("mixtral"), "nf4")
    assert fingerprint(quantized, ()) == fingerprint(expert_model("mixtral"), ())
    lp.load_adapter(quantized, tmp_path / "adapter")


def test_some_weights_of_a_module_may_stay_as_they_are():
    model = lp.quantize(expert_model("gpt_oss", "grouped_mm"), "nf4", targets=["experts.down"])
    experts = model.model.layers[0].mlp.experts
    assert (experts.gate_up_proj.dtype, experts.down_proj.dtype) == (torch.float32, torch.uint8)
    decoded = copy.deepcopy(model)
    lp.dequantize(decoded)
    lp.inject(model, lp.LoRA(targets=BOTH, rank=2))
    assert torch.equal(model(batch()).logits, decoded(batch()).logits)


def test_what_cannot_be_stored_is_refused_before_anything_changes():
    model = expert_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj, experts.down_proj = nn.Parameter(torch.randn(4, 46, 32)), nn.Parameter(torch.randn(4, 32, 23))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="nf4, which takes blocks of 64"):
        lp.quantize(model, "nf4", targets=["experts"])
    assert [type(module) for module in model.modules()] == before
    model = lp.quantize(expert_model("mixtral"), "int8")
    with pytest.raises(ValueError, match="is quantized already"):
        lp.quantize(model, "int8", targets=BOTH)


def loss(model, rows):
    return model(rows).logits.float().square().mean()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_the_plan_counts_experts_as_they_are_stored(kind, implementation):
    model = lp.quantize(expert_model("mixtral", implementation), kind, backend="torchao" if kind == "nf4" else None)
    stored = stored_bytes(model)
    full = sum(p.numel() for p in expert_model("mixtral").parameters())
    with torch.device("meta"):
        empty = expert_model("mixtral", implementation)
    lp.inject(quantize_shapes(empty, kind), lp.LoRA(targets=["all-linear"], rank=4))
    plan = plan_memory(empty, loss, {7: batch()})
    assert plan.frozen_weights + plan.buffers == pytest.approx(stored, abs=64)
    assert plan.frozen == full
    assert plan.dequantized == 4 * 4 * 48 * 32  # the up-projections of one block, in 32 bits
    adapters = 2 * 4 * 4 * ((48 + 32) + (32 + 24)) + 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2)
    assert plan.trained == adapters
    assert plan.activations[7] > 0
