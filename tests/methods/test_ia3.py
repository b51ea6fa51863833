"""(IA)^3: its sites, its formula, what it keeps for the backward pass, and an installed peer."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from families_of_models import attention, compare, copied, disturb, inside_first_blocks, plain, trained
from models import BEFORE_5, MODELS, logits, tokens
from small_models import small
from torch import nn

import lightning_peft as lp
from lightning_peft.methods.families import fused_scaling
from lightning_peft.structure.fused_rows import fused_rows, requested_rows
from lightning_peft.structure.roles import ROLES
from lightning_peft.structure.rows import Rows

SITES = {  # of the first block: of the encoder, then of the decoder
    "bert": ["attention.self.key", "attention.self.value", "output.dense in"],
    "distilbert": ["attention.k_lin", "attention.v_lin", "ffn.lin2 in"],
    "deberta": ["attention.self.key_proj", "attention.self.value_proj", "output.dense in"],
    "gpt2": ["attn.c_attn key", "attn.c_attn value", "mlp.c_proj in"],
    "gpt2, crossing": ["attn.c_attn key", "attn.c_attn value", "crossattention.c_attn key",
                       "crossattention.c_attn value", "mlp.c_proj in"],
    "llama": ["self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"],
    "t5": ["layer.0.SelfAttention.k", "layer.0.SelfAttention.v", "layer.1.DenseReluDense.wi_1",
           "layer.0.SelfAttention.k", "layer.0.SelfAttention.v", "layer.1.EncDecAttention.k",
           "layer.1.EncDecAttention.v", "layer.2.DenseReluDense.wi_1"],
    "t5, first version": ["layer.0.SelfAttention.k", "layer.0.SelfAttention.v", "layer.1.DenseReluDense.wo in",
                          "layer.0.SelfAttention.k", "layer.0.SelfAttention.v", "layer.1.EncDecAttention.k",
                          "layer.1.EncDecAttention.v", "layer.2.DenseReluDense.wo in"],
    "bart": ["self_attn.k_proj", "self_attn.v_proj", "fc2 in", "self_attn.k_proj", "self_attn.v_proj",
             "encoder_attn.k_proj", "encoder_attn.v_proj", "fc2 in"],
    "vit": ["attention.k_proj", "attention.v_proj", "mlp.fc2 in"],
    "fused_vit": ["attn.qkv key", "attn.qkv value", "mlp.fc2 in"],
    "torch": ["self_attn key", "self_attn value", "linear2 in", "self_attn key", "self_attn value",
              "multihead_attn key", "multihead_attn value", "linear2 in"],
    "plain": ["attention.k_proj", "attention.v_proj", "fc2 in"],
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_ia3_scales_keys_values_and_activations_of_each_attention_and_block(name):
    if BEFORE_5 and name == "vit":
        pytest.skip("transformers 5 renamed the layers of ViT")
    model = lp.inject(small(name), lp.IA3())
    found = [
        f"{inside_first_blocks(host)}{' in' if adapter.of_inputs else ''}{adapter.part and f' {adapter.part}'}"
        for host, *_, adapter in lp.adapters(model)
        if inside_first_blocks(host)
    ]
    assert found == SITES[name]
    (*_, last) = lp.adapters(model)
    assert torch.equal(last[3].scales, torch.ones_like(last[3].scales))


def test_gpt2_crosses_with_keys_and_values_alone():
    model = small("gpt2, crossing")
    name = "h.0.crossattention.c_attn"
    host = model.get_submodule(name)
    assert fused_rows(host, name) == [Rows("key", 0, 8), Rows("value", 8, 16)]
    assert requested_rows(name, host, wanted := ["attention.query", "attention.value"], wanted) == [
        Rows("value", 8, 16)
    ]
    assert list(ROLES["attention.query"](model)) == ["h.0.attn.c_attn", "h.0.crossattention.q_attn"]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_ia3_is_the_papers_formula(train):
    model = disturb(lp.inject(MODELS["plain"](), lp.IA3())).double().train(train)
    scales = copied(model)

    def step(number, block, x):
        key, value, inner = (
            scales[f"trunk.blocks.{number}.{place}.peft.ia3.scales"]
            for place in ("attention.k_proj", "attention.v_proj", "fc2")
        )
        x = x + attention(block, block.norm(x), key, value)
        return x + block.fc2(inner * F.relu(block.fc1(x)))

    compare(model, plain(step), scales)


@pytest.mark.parametrize("target", ["feedforward.down", "down_proj"])
def test_ia3_on_a_gated_block_scales_what_the_down_projection_takes(target):
    base = MODELS["llama"]().double()
    model = disturb(lp.inject(copy.deepcopy(base), lp.IA3(feedforward_targets=[target])))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for layer, own in zip(model.model.layers, base.model.layers, strict=True):
        host = layer.mlp.up_proj if target == "feedforward.down" else layer.mlp.down_proj
        inside = F.silu(own.mlp.gate_proj(x)) * own.mlp.up_proj(x)
        torch.testing.assert_close(layer.mlp(x), own.mlp.down_proj(host.peft["ia3"].scales * inside))


def test_ia3_leaves_the_other_up_projection_alone_where_it_must():
    hosts = lambda **settings: {n for n, *_ in lp.adapters(lp.inject(MODELS["llama"](), lp.IA3(**settings)))}  # noqa: E731
    assert "model.layers.0.mlp.down_proj" in hosts(exclude=["up_proj", "q_proj"])
    assert {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"} <= hosts(targets=["up_proj"])
    model = MODELS["llama"]()
    for layer in model.model.layers:  # a second up-projection of another width cannot be the one that is multiplied
        layer.mlp.up_proj = nn.Linear(32, 7)
    assert "model.layers.0.mlp.down_proj" in {n for n, *_ in lp.adapters(lp.inject(model, lp.IA3()))}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_ia3_scales_rows_that_torchs_attention_reads(bias):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, bias=bias)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    expected, x = copy.deepcopy(encoder), torch.randn(2, 5, 32)
    disturb(lp.inject(encoder, lp.IA3(targets=["attention.key", "attention.value", "out_proj"])))
    for own, base in zip(encoder.layers, expected.layers, strict=True):
        rows = torch.cat([torch.ones(32), *(own.self_attn.peft[f"ia3_{part}"].scales for part in ("key", "value"))])
        out, inputs = own.self_attn.out_proj.peft["ia3"].scales, own.linear2.peft["ia3"].scales
        pairs = [(base.self_attn, "in_proj_", rows), (base.self_attn.out_proj, "", out)]
        with torch.no_grad():
            base.linear2.weight.mul_(inputs)
            for module, prefix, scales in pairs:
                getattr(module, f"{prefix}weight").mul_(scales[:, None])
                if bias:
                    getattr(module, f"{prefix}bias").mul_(scales)
    torch.testing.assert_close(encoder(x), expected(x))
    encoder(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(encoder).values())
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), expected.eval()(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lp.merge(encoder)(x), expected(x), atol=1e-5, rtol=1e-5)


def test_attention_with_separate_projections_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=6, vdim=6)})
    with pytest.raises(TypeError, match="has separate projections"):
        lp.inject(model, lp.IA3(feedforward_targets=[]))


def layers(inputs, dtype=torch.float64):
    """One layer whose inputs or outputs are scaled."""
    net = lp.inject(
        nn.Sequential(nn.Linear(6, 8)),
        lp.IA3(targets=[] if inputs else ["0"], feedforward_targets=["0"] if inputs else []),
    )
    return disturb(net).to(dtype)


@pytest.fixture(params=["plain product", "saved output", "scaled weight"])
def count(request, monkeypatch):
    """A number of tokens for which a layer with 6 inputs and 8 outputs takes this form."""
    if request.param != "plain product":
        monkeypatch.setattr(fused_scaling, "FEW", 0)
    return 20 if request.param == "scaled weight" else 3


@pytest.mark.parametrize("inputs", [False, True], ids=["outputs", "inputs"])
def test_second_derivatives_of_scales_are_right(inputs, count):
    net = layers(inputs)
    (scales,) = trained(net).values()
    weight, bias = net[0].weight.detach(), net[0].bias.detach()
    x = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)

    def second(y):
        first = torch.autograd.grad(y.pow(3).sum(), [x, scales], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, scales])

    expected = (x * scales) @ weight.T + bias if inputs else scales * (x @ weight.T + bias)
    torch.testing.assert_close(second(net(x)), second(expected))


def test_a_scale_of_zero_still_learns(count):
    net = layers(False)
    (scales,) = trained(net).values()
    with torch.no_grad():
        scales[:3] = torch.tensor([0.0, -1e-30, -1e-10])
    x = torch.randn(count, 6, dtype=torch.float64)
    y = net(x)
    assert y[:, :2].abs().max() < 1e-18
    y.sin().sum().backward()
    expected = (net(x).cos() * (x @ net[0].weight.T + net[0].bias)).sum(0)
    torch.testing.assert_close(scales.grad, expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [False, True], ids=["outputs", "inputs"])
def test_scales_learn_in_16_bits_what_they_learn_in_32(inputs, count, dtype):
    net, x = layers(inputs, torch.float32), torch.randn(10 * count, 6)
    (scales,) = trained(net).values()
    with torch.no_grad():
        scales[0] = 0 if inputs else 1e-5
    (wide,) = torch.autograd.grad(net(x).square().mean(), [scales])
    with torch.autocast("cpu", dtype):
        y = net(x)
    assert y.dtype == dtype
    (by_autocast,) = torch.autograd.grad(y.float().square().mean(), [scales])
    (narrow,) = torch.autograd.grad(net.to(dtype)(x.to(dtype)).float().square().mean(), [scales])
    for found in (by_autocast, narrow):
        assert found.dtype == torch.float32
        assert (found - wide).norm() < 0.02 * wide.norm()


def kept(model, inputs):
    """Bytes of all storages kept for backward, each once, without parameters and buffers."""
    storages = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs.values())}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits(model(**inputs)).sum()
    return sum(s.nbytes() for at, s in storages.items() if at not in own)


def test_above_few_numbers_ia3_keeps_activations_of_blocks_alone_and_of_gated_ones_nothing(monkeypatch):
    monkeypatch.setattr(fused_scaling, "FEW", 0)
    inputs = {"input_ids": tokens(4, 16), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    fewer, whole = (
        kept(lp.inject(MODELS["bert"](), lp.IA3(feedforward_targets=targets)), inputs)
        for targets in ([], ["feedforward.down"])
    )
    assert whole - fewer == 3 * 4 * 16 * 48 * 4  # what goes into the down-projection, in three blocks
    other = lp.inject(MODELS["bert"](), lp.BitFit(targets=["attention.self.key", "attention.self.value"]))
    assert fewer - kept(other, inputs) < 4 * 16 * 16  # scales alone
    by_role, by_name = (
        kept(lp.inject(MODELS["llama"](), lp.IA3(feedforward_targets=[t])), inputs)
        for t in ("feedforward.down", "down_proj")
    )
    assert by_name - by_role == 3 * 4 * 16 * 48 * 4


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_ia3_keeps_less_than_peft_and_equals_it(name, monkeypatch):
    import peft

    down = {"bert": r"[0-9]\.output\.dense", "llama": "down_proj"}[name]
    pattern = rf".*({down}|key|value|k_proj|v_proj)"
    config = peft.IA3Config(target_modules=pattern, feedforward_modules=rf".*{down}")
    theirs = peft.get_peft_model(MODELS[name](), config).base_model.model
    ours = disturb(lp.inject(MODELS[name](), lp.IA3()))
    vectors = {n.partition(".ia3_l")[0]: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(vectors) == len(list(lp.adapters(ours))) == 9
    with torch.no_grad():
        for host, *_, adapter in lp.adapters(ours):
            vector = vectors[host.replace("up_proj", "down_proj")]
            vector.copy_(adapter.scales.view_as(vector))
    inputs = MODELS[name].inputs()
    y, z = logits(ours(**inputs)), logits(theirs(**inputs))
    print(f"ia3 on {name}: largest difference to peft {(y - z).abs().max():.1e} of {z.abs().max():.1f}")
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
    big = {"input_ids": tokens(8, 32), "attention_mask": torch.ones(8, 32, dtype=torch.long)}
    assert kept(ours, big) < kept(theirs, big)
    monkeypatch.setattr(fused_scaling, "FEW", 0)
    assert kept(ours, big) < 0.93 * kept(theirs, big)


def test_gradients_of_a_convolution_have_the_accuracy_of_float64():
    net = nn.Sequential(nn.Conv2d(2, 4, 3)).double()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    y = net(x).detach()
    lp.inject(net, lp.IA3(targets=["0"], feedforward_targets=[]))
    net(x).square().sum().backward()
    ((*_, adapter),) = lp.adapters(net)
    torch.testing.assert_close(adapter.scales.grad, 2 * y.square().sum((0, 2, 3)), rtol=1e-13, atol=0)
