"""LLaMA-Adapter: its attention by the paper's formula, and the scales and biases of its second version."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from families_of_models import copied, disturb
from models import MODELS, tokens
from single_layers import fill, only
from torch import nn
from trainer_models import Module, data, trainer

import lightning_peft as lp
from lightning_peft.methods.families.bias_and_scale import BiasAndScale

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


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_ends_within_the_warm_up_is_refused_before_it_starts(steps):
    strategy = lp.PEFTStrategy(lp.LLaMAAdapter(gate_warmup_steps=3, length=2), show_summary=False)
    with pytest.raises(ValueError, match=f"gate_warmup_steps=3, and the run has {steps} optimizer steps"):
        trainer(strategy, max_steps=steps).fit(Module(), data())
    trainer(strategy, max_steps=4).fit(net := Module(), data())
    assert all(adapter.gate.any() for *_, adapter in lp.adapters(net))


def rotate(x, cos, sin):
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


def test_llama_adapter_is_the_papers_attention():
    model = fill(lp.inject(MODELS["llama"](), lp.LLaMAAdapter(length=3, layers=1))).double()
    host, adapter = only(model)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    cos, sin = model.model.rotary_emb(x, torch.arange(5)[None])
    found, _ = host(x, position_embeddings=(cos, sin), attention_mask=None)

    heads, size = 4, 8
    split = lambda t: t.unflatten(-1, (-1, size)).transpose(-3, -2)  # noqa: E731
    q = rotate(split(host.q_proj(x)), cos[:, None], sin[:, None])
    k = rotate(split(host.k_proj(x)), cos[:, None], sin[:, None]).repeat_interleave(2, 1)
    v = split(host.v_proj(x)).repeat_interleave(2, 1)
    prompt_k = split(host.k_proj(adapter.prompt)).repeat_interleave(2, 0)  # no positions on prompt keys
    prompt_v = split(host.v_proj(adapter.prompt)).repeat_interleave(2, 0)
    own = (q @ k.mT / size**0.5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    added = adapter.gate.tanh().view(heads, 1, 1) * (q @ prompt_k.mT / size**0.5).softmax(-1)
    weights = torch.cat([added, own], -1)
    values = torch.cat([prompt_v.expand(2, -1, -1, -1), v], -2)
    expected = host.o_proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_llama_adapter_reads_fused_and_named_projections(name):
    model = fill(lp.inject(MODELS[name](), lp.LLaMAAdapter(length=3, layers=1))).double()
    host, adapter = only(model)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    split = lambda t: t.unflatten(-1, (4, 8)).transpose(-3, -2)  # noqa: E731
    if name == "gpt2":
        q, k, v = (split(t) for t in host.c_attn(x).chunk(3, -1))
        prompt_k, prompt_v = (split(t) for t in host.c_attn(adapter.prompt).chunk(3, -1)[1:])
    else:
        q, k, v = (split(f(x)) for f in (host.query, host.key, host.value))
        prompt_k, prompt_v = split(host.key(adapter.prompt)), split(host.value(adapter.prompt))
    own = F.scaled_dot_product_attention(q, k, v, is_causal=name == "gpt2")
    added = adapter.gate.tanh().view(4, 1, 1) * ((q @ prompt_k.mT / 8**0.5).softmax(-1) @ prompt_v)
    expected = (own + added).transpose(1, 2).flatten(2)
    expected = host.c_proj(expected) if name == "gpt2" else expected
    torch.testing.assert_close(host(x)[0], expected)
