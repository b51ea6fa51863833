"""Bottleneck and parallel adapters: sites, formulas, what trains beside them, and a peer with copied weights."""

import copy
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from families_of_models import attention, compare, copied, disturb, inside_first_blocks, plain, trained
from models import BEFORE_5, MODELS, Plain, logits, tokens
from small_models import small
from torch import nn

import lightning_peft as lp
from lightning_peft.structure.roles import ROLES

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
    if BEFORE_5 and name == "vit":
        pytest.skip("transformers 5 renamed the layers of ViT")
    model = lp.inject(small(name), lp.Bottleneck(size=3))
    found = [inside_first_blocks(host) for host, *_ in lp.adapters(model) if inside_first_blocks(host)]
    assert found == PLACES[name]


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
    if BEFORE_5 and name == "vit":
        pytest.skip("transformers 5 renamed the layers of ViT")
    one, two = (disturb(lp.inject(MODELS[name](), lp.ParallelAdapter(size=4, targets=[t]))) for t in TWO_WAYS)
    for (*_, mine), (*_, other) in zip(lp.adapters(one), branches(two), strict=True):
        mine.load_state_dict(other.state_dict())
    inputs = MODELS[name].inputs()
    torch.testing.assert_close(logits(one(**inputs)), logits(two(**inputs)))


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
