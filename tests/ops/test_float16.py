"""Updates in float16: what lies between two factors may be larger than the type holds, as in HF peft."""

import copy

import pytest
import torch
from test_weight_updates import LAYERS, METHODS, build
from torch import nn

import lightning_peft as lp

LARGE = ("lora", "rslora", "orthogonal", "pissa", "adalora", "fedpara", "fedpara, narrow", "krona")
ON = [layer for layer in LAYERS if not layer.startswith(("quantized", "fused"))]


def layer_with_large_a():
    """Return a layer with A x = 96,000 and B A x = 96 for x = 1."""
    net = lp.inject(nn.Sequential(nn.Linear(32, 4)), lp.LoRA(targets=["0"], rank=1, alpha=1)).half()
    ((*_, adapter),) = lp.adapters(net)
    with torch.no_grad():
        net[0].weight.fill_(0)
        net[0].bias.fill_(88)
        adapter.a.fill_(3000)
        adapter.b.fill_(1e-3)
    return net


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_large_product_with_the_first_factor_is_no_infinity(mode, rows):
    net, x = layer_with_large_a(), torch.ones(rows, 32, dtype=torch.float16)
    expected = torch.full((rows, 4), 184, dtype=torch.float16)
    assert torch.equal(net.train(mode == "train")(x), expected)
    assert torch.equal(lp.merge(copy.deepcopy(net))(x), expected)


def test_peft_computes_the_same():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 4)).half(), peft.LoraConfig(target_modules=["0"], r=1, lora_alpha=1)
    )
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.fill_(0)
        layer.base_layer.bias.fill_(88)
        layer.lora_A.default.weight.fill_(3000)
        layer.lora_B.default.weight.fill_(1e-3)
    x = torch.ones(2, 32, dtype=torch.float16)
    assert torch.equal(layer_with_large_a()(x), theirs(x))


def test_dropped_inputs_do_not_overflow():
    net = layer_with_large_a()
    ((*_, adapter),) = lp.adapters(net)
    adapter.dropout = 0.5
    y = net.train()(torch.ones(400, 32, dtype=torch.float16))
    assert y.isfinite().all()
    assert 174 < y.float().mean() < 194
    y.float().sum().backward()
    assert adapter.a.grad.isfinite().all()
    assert adapter.b.grad.isfinite().all()


def test_rows_with_an_adapter_each_do_not_overflow():
    net = layer_with_large_a()
    lp.add_adapter(net, lp.LoRA(name="other", targets=["0"], rank=2))
    x = torch.ones(2, 3, 32, dtype=torch.float16)
    with torch.no_grad(), lp.row_adapters(net, ["lora", "other"]):
        y = net(x)
    assert torch.equal(y[0], torch.full((3, 4), 184, dtype=torch.float16))
    assert torch.equal(y[1], torch.full((3, 4), 88, dtype=torch.float16))


@pytest.mark.parametrize("layer", ON)
@pytest.mark.parametrize("name", LARGE)
def test_live_is_finite_where_merged_is(name, layer):
    net, x, adapters = build(layer, METHODS[name])
    with torch.no_grad():
        for adapter in adapters:
            own = dict(adapter.named_parameters())
            first, second = next(pair for pair in (("a", "b"), ("y1", "x1")) if set(pair) <= own.keys())
            own[first] *= 3000
            own[second] /= 3000
    net, x = net.half().eval(), 20 * x.half()
    y, merged = net(x).float(), lp.merge(copy.deepcopy(net))(x).float()
    assert merged.isfinite().all()
    assert (y - merged).norm() < 0.01 * merged.norm()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_do_not_overflow(implementation):
    transformers = pytest.importorskip("transformers", "5")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).half().eval()
    model.set_experts_implementation(implementation)
    lp.inject(model, lp.LoRA(targets=["experts"], rank=2))
    with torch.no_grad():
        for *_, adapter in lp.adapters(model):
            adapter.a.normal_(std=30000)
            adapter.b.normal_(std=1e-6)
        x = torch.arange(12)[None]
        y = model(x).logits
        merged = lp.merge(model)(x).logits
    assert y.isfinite().all()
    torch.testing.assert_close(y, merged, atol=2e-3, rtol=1e-2)
