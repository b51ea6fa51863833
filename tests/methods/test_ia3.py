"""(IA)^3, bottleneck and parallel adapters, and LLaMA-Adapter's scales: sites, formulas, peers, what is refused."""

import copy
import dataclasses
import importlib.util
import math
import re

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, Plain, logits, tokens
from torch import nn

import lightning_peft as lp
from lightning_peft.methods.families.bias_and_scale import BiasAndScale
from lightning_peft.structure.fused_rows import fused_rows, requested_rows
from lightning_peft.structure.roles import ROLES


def small(name):
    import transformers as t

    like_bert = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
                 "num_attention_heads": 2}  # fmt: skip
    like_gpt2 = {"vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    like_bart = {"vocab_size": 8, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12,
                 "decoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    like_t5 = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    made = {
        "bert, masks": lambda: t.BertForMaskedLM(t.BertConfig(**like_bert)),
        "bert, alone": lambda: t.BertModel(t.BertConfig(**like_bert)),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**like_bert)),
        "deberta": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**like_bert)),
        "llama, classes": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**like_bert)),
        "gpt2, crossing": lambda: t.GPT2Model(t.GPT2Config(**like_gpt2, add_cross_attention=True)),
        "gpt2, two heads": lambda: t.GPT2DoubleHeadsModel(t.GPT2Config(**like_gpt2)),
        "bart, classes": lambda: t.BartForSequenceClassification(t.BartConfig(**like_bart)),
        "t5, first version": lambda: t.T5Model(t.T5Config(**like_t5)),
        "torch": lambda: nn.Transformer(8, 2, 1, 1, 12, batch_first=True),
        "bert in a module": lambda: nn.ModuleDict({"net": made["bert, alone"](), "top": nn.Linear(8, 3)}),
    }
    return made[name]() if name in made else MODELS[name]()


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


def inside_first_blocks(name):
    """Return what follows the number of block 0 in a dotted name, if it is in one."""
    number, rest = re.match(r"(?:.*?\.)?(?:layers?|h|blocks?)\.(\d+)\.(.*)", name).groups()
    return rest if number == "0" else None


@pytest.mark.parametrize("name", SITES)
def test_ia3_scales_keys_values_and_activations_of_each_attention_and_block(name):
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
    assert fused_rows(host, name) == [("key", 0, 8), ("value", 8, 16)]
    assert requested_rows(name, host, wanted := ["attention.query", "attention.value"], wanted) == [("value", 8, 16)]
    assert list(ROLES["attention.query"](model)) == ["h.0.attn.c_attn", "h.0.crossattention.q_attn"]


def disturb(model, spread=0.5):
    torch.manual_seed(3)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def heads_of(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attention(block, h, scale_key=1.0, scale_value=1.0):
    """Attention of the plain model, in words of the paper."""
    own = block.attention
    q, k, v = own.q_proj(h), own.k_proj(h) * scale_key, own.v_proj(h) * scale_value
    q, k, v = (heads_of(x, own.num_heads) for x in (q, k, v))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return own.out_proj((weights @ v).transpose(1, 2).flatten(2))


def plain(step):
    """Run the plain model with ``step(number, block, x)`` for each block, in float64."""
    base = MODELS["plain"]().double()
    x = base.embed(tokens())
    for number, block in enumerate(base.trunk.blocks):
        x = step(number, block, x)
    return base.head(x)


def compare(model, expected, copies):
    """Compare outputs, and gradients of adapters with those of ``copies``, by host, part and name."""
    y = model(tokens())
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), list(trained(model).values()))
    by_name = dict(zip(trained(model), found, strict=True))
    wanted = torch.autograd.grad(expected.square().sum(), list(copies.values()))
    for name, gradient in zip(copies, wanted, strict=True):
        torch.testing.assert_close(by_name[name], gradient)
    assert len(copies) == len(by_name)


def copied(model):
    return {name: p.detach().clone().requires_grad_() for name, p in trained(model).items()}


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
    """One layer, with tokens enough that scales go into its weight, and so few that they do not."""
    net = lp.inject(
        nn.Sequential(nn.Linear(6, 8)),
        lp.IA3(targets=[] if inputs else ["0"], feedforward_targets=["0"] if inputs else []),
    )
    return disturb(net).to(dtype)


@pytest.mark.parametrize("tokens", [3, 20], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("inputs", [False, True], ids=["outputs", "inputs"])
def test_second_derivatives_of_scales_are_right(inputs, tokens):
    net = layers(inputs)
    (scales,) = trained(net).values()
    weight, bias = net[0].weight.detach(), net[0].bias.detach()
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)

    def second(y):
        first = torch.autograd.grad(y.pow(3).sum(), [x, scales], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, scales])

    expected = (x * scales) @ weight.T + bias if inputs else scales * (x @ weight.T + bias)
    torch.testing.assert_close(second(net(x)), second(expected))


@pytest.mark.parametrize("tokens", [3, 20], ids=["few tokens", "many tokens"])
def test_a_scale_of_zero_still_learns(tokens):
    net = layers(False)
    (scales,) = trained(net).values()
    with torch.no_grad():
        scales[:3] = torch.tensor([0.0, -1e-30, -1e-10])
    x = torch.randn(tokens, 6, dtype=torch.float64)
    y = net(x)
    assert y[:, :2].abs().max() < 1e-18
    y.sin().sum().backward()
    expected = (net(x).cos() * (x @ net[0].weight.T + net[0].bias)).sum(0)
    torch.testing.assert_close(scales.grad, expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, 200], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("inputs", [False, True], ids=["outputs", "inputs"])
def test_scales_learn_in_16_bits_what_they_learn_in_32(inputs, tokens, dtype):
    net, x = layers(inputs, torch.float32), torch.randn(tokens, 6)
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


def test_ia3_keeps_activations_of_blocks_alone_and_of_gated_ones_nothing():
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
def test_ia3_keeps_less_than_peft_and_equals_it(name):
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
    assert kept(ours, big) < 0.93 * kept(theirs, big)


PLACES = {  # where bottlenecks go in the first block: of the encoder, then of the decoder
    "bert": ["attention.output.dense", "output.dense"],
    "distilbert": ["attention.out_lin", "ffn.lin2"],
    "deberta": ["attention.output.dense", "output.dense"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "gpt2, crossing": ["attn.c_proj", "crossattention.c_proj", "mlp.c_proj"],
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "t5": ["layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo", "layer.0.SelfAttention.o",
           "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"],
    "bart": ["self_attn.out_proj", "fc2", "self_attn.out_proj", "encoder_attn.out_proj", "fc2"],
    "vit": ["attention.o_proj", "mlp.fc2"],
    "fused_vit": ["attn.proj", "mlp.fc2"],
    "torch": ["self_attn", "linear2", "self_attn", "multihead_attn", "linear2"],
    "plain": ["attention.out_proj", "fc2"],
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_bottlenecks_follow_each_attention_and_each_feed_forward_block(name):
    model = lp.inject(small(name), lp.Bottleneck(size=3))
    found = [inside_first_blocks(host) for host, *_ in lp.adapters(model) if inside_first_blocks(host)]
    assert found == PLACES[name]


HEADS = {
    "bert": ["classifier"],
    "bert, alone": [],
    "bert, masks": [],
    "bert in a module": ["top"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["pre_classifier", "classifier"],
    "deberta": ["pooler.dense", "classifier"],
    "gpt2": [],
    "gpt2, two heads": ["multiple_choice_head.summary"],
    "llama": [],
    "llama, classes": ["score"],
    "t5": [],
    "bart": [],
    "bart, classes": ["classification_head.dense", "classification_head.out_proj"],
    "vit": ["classifier"],
    "fused_vit": ["head"],
    "plain": ["head"],
}
NORMS = {
    "bert": 7,
    "bert, masks": 4,  # that of the vocabulary's head as well
    "distilbert": 7,
    "gpt2": 7,
    "llama": 7,
    "t5": 6 + 9 + 2,
    "bart": 1 + 6 + 1 + 9,
    "vit": 7,
    "encoder": 6,
    "plain": 3,
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_what_only_the_task_uses(name):
    assert ROLES["head"](small(name)) == HEADS[name]


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_known_by_their_types(name):
    assert len(ROLES["norms"](small(name))) == NORMS[name]


def test_a_norm_without_parameters_or_with_statistics_is_none():
    net = nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), nn.BatchNorm1d(3), nn.RMSNorm(3), nn.GroupNorm(1, 3))
    assert ROLES["norms"](net) == ["2", "3"]
    assert ROLES["norms"](lp.inject(net, lp.FullFineTuning())) == ["2", "3"]


def test_bottlenecks_train_norms_and_the_head_unless_told_otherwise():
    base = {n for n in trained(lp.inject(MODELS["bert"](), lp.Bottleneck())) if ".peft." not in n}
    norms = {f"{name}.{kind}" for name in ROLES["norms"](MODELS["bert"]()) for kind in ("weight", "bias")}
    assert base == norms | {"classifier.weight", "classifier.bias"}
    alone = lp.inject(MODELS["bert"](), lp.Bottleneck(train_norms=False, train_head=False))
    assert all(".peft." in name for name in trained(alone))
    bare = nn.Sequential(nn.Linear(3, 4))  # without norms there are none to train
    assert set(trained(lp.inject(bare, lp.Bottleneck(targets=["0"], train_head=False)))) == {
        f"0.peft.bottleneck.{name}" for name in ("down", "down_bias", "up", "up_bias")
    }


def test_bottlenecks_start_as_the_paper_says():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 300))
    lp.inject(net, lp.Bottleneck(targets=["0"], size=100, std=0.05, train_head=False))
    adapter = net[0].peft["bottleneck"]
    for weight in (adapter.down, adapter.up):
        assert weight.abs().max() <= 0.1
        assert abs(weight.std() / 0.05 - 0.88) < 0.01  # what cutting at two standard deviations leaves
        assert abs(weight.mean()) < 1e-3
    assert not adapter.down_bias.any()
    assert not adapter.up_bias.any()
    assert (adapter.down.shape, adapter.up.shape) == ((100, 300), (300, 100))


PHI = {"gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), "relu": lambda x: x.clamp(min=0),
       "swish": lambda x: x / (1 + (-x).exp())}  # fmt: skip


@pytest.mark.parametrize("activation", PHI)
def test_bottlenecks_are_the_papers_formula(activation):
    method = lp.Bottleneck(size=5, activation=activation, train_norms=False, train_head=False)
    model = disturb(lp.inject(MODELS["plain"](), method)).double().train()
    copies = copied(model)

    def after(place, y):
        down, up, down_bias, up_bias = (
            copies[f"trunk.blocks.{place}.peft.bottleneck.{name}"] for name in ("down", "up", "down_bias", "up_bias")
        )
        return y + PHI[activation](y @ down.T + down_bias) @ up.T + up_bias

    def step(number, block, x):
        x = x + after(f"{number}.attention.out_proj", attention(block, block.norm(x)))
        return x + after(f"{number}.fc2", block.fc2(F.relu(block.fc1(x))))

    compare(model, plain(step), copies)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", PHI)
def test_parallel_adapters_are_the_papers_formula(activation, bias):
    method = lp.ParallelAdapter(size=5, activation=activation, bias=bias, scale=3)
    model = disturb(lp.inject(MODELS["plain"](), method)).double().train()
    copies = copied(model)

    def step(number, block, x):
        own = {n: copies.get(f"trunk.blocks.{number}.fc2.peft.parallel_adapter.{n}", torch.zeros(())) for n in NAMES}
        x = x + attention(block, block.norm(x))
        inside = PHI[activation](x @ own["down"].T + own["down_bias"])
        return x + block.fc2(F.relu(block.fc1(x))) + 3 * (inside @ own["up"].T + own["up_bias"])

    compare(model, plain(step), copies)


NAMES = ("down", "up", "down_bias", "up_bias")


def test_parallel_adapters_start_as_the_paper_says():
    adapter = lp.inject(MODELS["plain"](), lp.ParallelAdapter(size=50)).trunk.blocks[0].fc2.peft["parallel_adapter"]
    assert not adapter.up.any()
    assert 0.9 / math.sqrt(32) < adapter.down.abs().max() <= 1 / math.sqrt(32)


TWO_WAYS = ("mlp", "feedforward")


def branches(model):
    return [found for found in lp.adapters(model) if list(found[3].parameters())]


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_both_ways_to_name_a_block_agree(name):
    one, two = (disturb(lp.inject(MODELS[name](), lp.ParallelAdapter(size=4, targets=[t]))) for t in TWO_WAYS)
    for (*_, mine), (*_, other) in zip(lp.adapters(one), branches(two), strict=True):
        mine.load_state_dict(other.state_dict())
    inputs = MODELS[name].inputs()
    torch.testing.assert_close(logits(one(**inputs)), logits(two(**inputs)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method",
    [lp.IA3(), lp.Bottleneck(size=4), lp.ParallelAdapter(size=4), lp.IA3(targets=["linear1"])],
    ids=["ia3", "bottleneck", "parallel", "ia3, outputs"],
)
def test_rows_that_torch_packs_are_changed_too(method, dtype):
    model = disturb(lp.inject(MODELS["encoder"](), method), 0.1).to(dtype)
    inputs = MODELS["encoder"].inputs("right")
    with torch.no_grad():
        packed, padded = model(**inputs), model.train()(**inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * padded.abs().max()
    torch.testing.assert_close(packed[:, :7], padded[:, :7], atol=tolerance, rtol=tolerance)


def test_a_bottleneck_after_torchs_attention_changes_its_first_result():
    torch.manual_seed(0)
    net = nn.Module()
    net.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    base, x = copy.deepcopy(net.attention), torch.randn(2, 5, 8)
    disturb(lp.inject(net, lp.Bottleneck(targets=["attention.output"], size=3, train_head=False)))
    assert [name for name, *_ in lp.adapters(net)] == ["attention"]
    (y, weights), (expected, same) = net.attention(x, x, x), base(x, x, x)
    own = net.attention.peft["bottleneck"]
    changed = expected + F.gelu(expected @ own.down.T + own.down_bias) @ own.up.T + own.up_bias
    torch.testing.assert_close(y, changed)
    torch.testing.assert_close(weights, same)


def test_bottlenecks_go_wherever_a_tensor_comes_first():
    model = disturb(
        lp.inject(MODELS["bert"](), lp.Bottleneck(size=3, targets=["attention", "layer.[0-9]", "classifier"]))
    )
    assert len(list(lp.adapters(model))) == 3 + 3 + 1
    assert model.classifier.peft["bottleneck"].down.shape == (3, 3)
    assert (logits(model(tokens())) - logits(MODELS["bert"]()(tokens()))).abs().max() > 1e-2
    assert len(list(lp.adapters(lp.inject(MODELS["plain"](), lp.Bottleneck(targets=["feedforward.down"]))))) == 3


class Named(nn.Linear):
    def forward(self, x):
        return {"y": super().forward(x)}


REFUSED = {
    "no linear layer": (lambda: lp.Bottleneck(targets=["dropout"]), ValueError, "dropout .* holds no linear layer"),
    "no block": (lambda: lp.ParallelAdapter(targets=["word_embeddings"]), ValueError, "holds no linear layers"),
    "size": (lambda: lp.Bottleneck(size=0), ValueError, "size must be a positive whole number, got 0"),
    "activation": (lambda: lp.ParallelAdapter(activation="tanh"), ValueError, "one of gelu, relu, swish, got 'tanh'"),
    "std": (lambda: lp.Bottleneck(std=-1.0), ValueError, "std must be 0 or more"),
    "scale": (lambda: lp.ParallelAdapter(scale=0.0), ValueError, "scale must be a factor other than 0"),
    "dropout": (lambda: lp.ParallelAdapter(dropout=1.0), ValueError, "dropout must be from 0"),
    "both": (lambda: lp.IA3(targets=["output.dense"]), ValueError, "in one of both lists of targets"),
    "embedding": (lambda: lp.IA3(targets=["word_embeddings"]), ValueError, "must be a layer of features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name):
    make, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said):
        lp.inject(MODELS["bert"](), make())


def test_what_returns_no_tensor_is_refused():
    net = lp.inject(nn.Sequential(Named(3, 4)), lp.Bottleneck(targets=["0"]))
    with pytest.raises(TypeError, match="Named returns a dict"):
        net(torch.randn(2, 3))


def test_activations_are_dropped_in_training_alone(monkeypatch):
    called = []
    whole = F.dropout
    monkeypatch.setattr(F, "dropout", lambda *args, **kwargs: called.append(args[0].shape) or whole(*args, **kwargs))
    net, x = Plain().trunk.blocks[0], torch.randn(2, 5, 32)
    disturb(lp.inject(net, lp.ParallelAdapter(size=6, dropout=0.5)))
    assert not torch.equal(net.train()(x), net(x))
    assert called == [(2, 5, 6)] * 2
    assert torch.equal(net.eval()(x), net(x))
    assert len(called) == 2
    lp.inject(lp.detach(net), lp.ParallelAdapter(size=6)).train()(x)
    assert len(called) == 2


@pytest.mark.parametrize(
    "method",
    [lp.IA3(), lp.Bottleneck(size=4), lp.ParallelAdapter(size=4), lp.LLaMAAdapter(layers=2, bias_and_scale=True)],
    ids=lambda method: type(method).__name__,
)
def test_quantized_hosts_are_served(method):
    """What comes out is what adapters of these values do on the dequantized base."""
    results = []
    for dequantized in (False, True):
        model = lp.quantize(MODELS["bert"](), "int8")
        if dequantized:
            lp.dequantize(model)
        disturb(lp.inject(model, method), 0.2)
        if results:
            given = [p for n, p in results[0][0].named_parameters() if ".peft." in n]
            with torch.no_grad():
                for own, other in zip((p for n, p in model.named_parameters() if ".peft." in n), given, strict=True):
                    own.copy_(other)
        results.append((model, logits(model(tokens())), {n: p for n, p in trained(model).items() if ".peft." in n}))
    (_, y, found), (_, z, wanted) = results
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
    pairs = [torch.autograd.grad(t.square().mean(), list(p.values())) for t, p in ((y, found), (z, wanted))]
    torch.testing.assert_close(*pairs, atol=1e-5, rtol=1e-4)


def test_mam_is_a_prefix_and_a_parallel_adapter():
    model = lp.inject(MODELS["bart"](), [lp.PrefixTuning(length=3), lp.ParallelAdapter(size=6)])
    logits(model(**MODELS["bart"].inputs())).square().sum().backward()
    assert all(p.grad is not None for p in trained(model).values())


V2 = {"length": 2, "train_norms": True, "bias_and_scale": True}


def test_scales_and_biases_are_the_papers_formula():
    model = disturb(lp.inject(MODELS["plain"](), lp.LLaMAAdapter(**V2 | {"train_norms": False}))).double().train()
    with torch.no_grad():
        for *_, adapter in lp.adapters(model):
            if hasattr(adapter, "gate"):
                adapter.gate.zero_()
    copies = {name: p for name, p in copied(model).items() if "affine" in name}
    base = MODELS["plain"]().double()
    for name, module in base.trunk.named_modules():
        if isinstance(module, nn.Linear):
            s, b = (copies[f"trunk.{name}.peft.llama_adapter_affine.{kind}"] for kind in ("scale", "bias"))
            module.register_forward_hook(lambda m, args, y, s=s, b=b: s * (y + b))
    y, expected = model(tokens()), base(tokens())
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), [model.get_parameter(name) for name in copies])
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), list(copies.values())))
    assert len(copies) == 2 * 3 * 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine(lp.Method):
    name: str = "affine"

    def adapters(self, model):
        yield "0", BiasAndScale(model[0])


class Bare(nn.Linear):
    """A linear layer without a place for a bias."""

    def __init__(self):
        super().__init__(6, 8, bias=False)
        del self._parameters["bias"]

    def forward(self, x):
        return x @ self.weight.T


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(8, 6)


class Attending(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


HOSTS = {  # and the shape of inputs
    "linear": (lambda: nn.Linear(6, 8), (20, 6)),
    "few tokens": (lambda: nn.Linear(6, 8), (2, 6)),
    "no bias": (lambda: nn.Linear(6, 8, bias=False), (20, 6)),
    "conv1d of transformers": (conv1d, (20, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3), (2, 6, 5, 5)),
    "attention": (lambda: Attending(8, 2), (5, 2, 8)),
    "attention, no bias": (lambda: Attending(8, 2, bias=False), (5, 2, 8)),
}


@pytest.mark.parametrize("name", HOSTS)
def test_scales_and_biases_merge_into_weight_and_bias(name):
    make, shape = HOSTS[name]
    torch.manual_seed(0)
    net, x = nn.Sequential(make()).double(), torch.randn(shape, dtype=torch.float64)
    base = copy.deepcopy(net[0])
    ((_, _, _, adapter),) = lp.adapters(disturb(lp.inject(net, Affine())))
    y = net(x)
    if name.startswith("attention"):
        bias = 0 if base.in_proj_bias is None else base.in_proj_bias
        base.in_proj_bias = nn.Parameter((adapter.scale * (bias + adapter.bias)).detach())
        base.in_proj_weight = nn.Parameter((adapter.scale[:, None] * base.in_proj_weight).detach())
        expected = base(x)
    else:
        scale, bias = (
            t.view(-1, *[1] * (x.dim() - 2)) if name == "conv2d" else t for t in (adapter.scale, adapter.bias)
        )
        expected = scale * (base(x) + bias)
        found = torch.autograd.grad(y.square().sum(), [adapter.scale, adapter.bias])
        torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), [adapter.scale, adapter.bias]))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(lp.merge(net)(x), expected)
    assert type(net[0]) is type(base)


def test_a_bias_merges_only_where_there_is_a_place_for_it():
    net = lp.inject(nn.Sequential(Bare()), Affine())
    weight = net[0].weight.clone()
    with pytest.raises(TypeError, match="Bare has no place for a bias"):
        lp.merge(net)
    assert torch.equal(net[0].weight, weight)
    with pytest.raises(TypeError, match="cannot be merged"):  # prompts cannot
        lp.merge(lp.inject(MODELS["llama"](), lp.LLaMAAdapter(**V2)))


def test_a_gate_that_waits_leaves_scales_alone():
    method = lp.LLaMAAdapter(gate_warmup_steps=2, **V2)
    model = disturb(lp.inject(MODELS["llama"](), method))
    adapters = [adapter for *_, adapter in lp.adapters(model)]
    method.after_step(adapters, 1, 10)
    assert all(not a.gate.any() for a in adapters if hasattr(a, "gate"))
    assert all(a.scale.std() > 0.1 for a in adapters if isinstance(a, BiasAndScale))
    named = {name: adapter for name, *_, adapter in lp.adapters(model)}
    assert list(method.metrics(named)) == ["llama_adapter/gate/model.layers.2.self_attn"]


def peer(config):
    """The peer's BERT with its adapters, whose tensors all matter, and a base of the same weights."""
    import adapters
    from transformers import BertConfig, BertModel

    settings = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = BertModel(BertConfig(vocab_size=64, **settings)).eval()
    theirs = copy.deepcopy(base)
    adapters.init(theirs)
    theirs.add_adapter("x", config=config)
    theirs.set_active_adapters("x")
    theirs.train_adapter("x")
    for name, parameter in theirs.named_parameters():
        if "adapters.x" in name:
            nn.init.normal_(parameter, std=0.3)
    return base, theirs.eval()


PEERS = {
    "houlsby": ("DoubleSeqBnConfig", {"reduction_factor": 4, "non_linearity": "gelu"}, lp.Bottleneck(size=8)),
    "after feed-forward alone": (
        "SeqBnConfig",
        {"reduction_factor": 4, "original_ln_before": False},
        lp.Bottleneck(size=8, activation="relu", targets=["feedforward.down"]),
    ),
    "parallel": ("ParBnConfig", {"reduction_factor": 2}, lp.ParallelAdapter(size=16, bias=True)),
}


@pytest.mark.skipif(importlib.util.find_spec("adapters") is None, reason="the package adapters is not installed")
@pytest.mark.parametrize("name", PEERS)
def test_it_equals_the_package_adapters_with_copied_weights(name):
    import adapters

    config, settings, method = PEERS[name]
    base, theirs = peer(getattr(adapters, config)(**settings))
    lp.inject(base, method)
    tensors = {n: p for n, p in theirs.named_parameters() if "adapters.x" in n}
    for host, *_, adapter in lp.adapters(base):
        if not hasattr(adapter, "down"):
            continue
        place = host.removesuffix(".dense")
        own = {n: p for n, p in tensors.items() if n.startswith(f"{place}.")}
        with torch.no_grad():
            for key, other in (("down", "adapter_down.0"), ("up", "adapter_up")):
                for mine, kind in ((key, "weight"), (f"{key}_bias", "bias")):
                    (found,) = (tensors.pop(n) for n in own if n.endswith(f"{other}.{kind}"))
                    adapter.get_parameter(mine).copy_(found)
    assert not tensors
    x = torch.randn(2, 7, 32, requires_grad=True)
    y, z = (model(inputs_embeds=x).last_hidden_state for model in (base, theirs))
    by_x = [torch.autograd.grad(out.square().mean(), x)[0] for out in (y, z)]
    largest = [(one - two).abs().max() for one, two in ((y, z), by_x)]
    print(f"{name}: largest difference to adapters {largest[0]:.1e}, of gradients {largest[1]:.1e}")
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*by_x, atol=1e-6, rtol=1e-4)
