"""Formulas written afresh, in float64, and installed peers with copied weights."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, logits, tokens
from torch import nn

import lightning_peft as lp


def only(model):
    ((_, host, _, adapter),) = lp.adapters(model)
    return host, adapter


def fill(model):
    torch.manual_seed(5)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(10, 6)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), (4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 10, bias=False), (2, 3, 6)),
    "transformers conv1d": (conv1d, (4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 9)),
    "conv2d strided": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 7, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 10, 3, groups=2), (2, 6, 7, 7)),
    "conv2d dilated, reflecting": (
        lambda: nn.Conv2d(6, 10, 3, dilation=2, padding=2, padding_mode="reflect"),
        (2, 6, 7, 7),
    ),
    "conv3d": (lambda: nn.Conv3d(6, 10, 2), (2, 6, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_lora_is_a_layer_with_the_updated_weight(name):
    make, shape = LAYERS[name]
    base = make().double()
    x = torch.tensor([[0, 3, 9], [4, 4, 1]]) if shape is None else torch.randn(shape, dtype=torch.float64)
    x = x.requires_grad_() if shape else x
    model = fill(lp.inject(Net(base), lp.LoRA(rank=2, alpha=5, targets=["layer"])))
    host, adapter = only(model)
    assert adapter.a.dtype == torch.float64
    y = model(x)
    inputs = [adapter.a, adapter.b, *([x] if shape else [])]
    gradients = torch.autograd.grad(y.square().sum(), inputs)

    a, b = (t.detach().clone().requires_grad_() for t in (adapter.a, adapter.b))
    update = 5 / 2 * torch.einsum("or,r...->o...", b, a)
    stored = host.weight + (update.T if shape is None or name.startswith("transformers") else update)
    plain = make().double()
    state = {"weight": stored} | ({"bias": host.bias} if getattr(host, "bias", None) is not None else {})
    expected = torch.func.functional_call(plain, state, (x,))
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(expected.square().sum(), [a, b, *([x] if shape else [])])
    if shape is None:  # the padding row gets no gradient in the layer, and its update none either
        found = [found[0].index_fill(1, torch.tensor([0]), 0), found[1]]
        gradients = [gradients[0].index_fill(1, torch.tensor([0]), 0), gradients[1]]
        torch.testing.assert_close(gradients[0], found[0])
        return
    torch.testing.assert_close(list(gradients), list(found))


KRONA = [name for name in LAYERS if name not in ("linear without bias", "conv2d dilated, reflecting")]


@pytest.mark.parametrize("settings", [{}, {"shape_a": [3, 2]}, {"factor": 1}], ids=str)
@pytest.mark.parametrize("name", KRONA)
def test_krona_is_a_layer_with_the_updated_weight(name, settings):
    make, shape = LAYERS[name]
    base, groups = make().double(), 2 if "grouped" in name else 1
    if shape is None:  # a1 divides the vocabulary
        settings = {"shape_a": [2, 3]} if "shape_a" in settings else settings
    if groups == 2 and "shape_a" in settings:
        settings = {"shape_a": [1, 5]}  # a group has three inputs
    x = torch.tensor([[0, 3, 9], [4, 4, 1]]) if shape is None else torch.randn(shape, dtype=torch.float64)
    x = x.requires_grad_() if shape else x
    model = fill(lp.inject(Net(base), lp.KronA(scale=3, targets=["layer"], **settings)))
    host, adapter = only(model)
    if "shape_a" in settings:
        assert list(adapter.a.shape) == settings["shape_a"]
    y = model(x)
    inputs = [adapter.a, adapter.b, *([x] if shape else [])]
    gradients = torch.autograd.grad(y.square().sum(), inputs)

    a, b = (t.detach().clone().requires_grad_() for t in (adapter.a, adapter.b))
    ones = [1] * (b.dim() - 2)
    update = 3 * torch.kron(a.view(*a.shape, *ones), b).transpose(0, 1)  # the paper's product is (in, out)
    row = torch.ones(host.weight.shape, dtype=torch.float64)
    if shape is None:
        row[host.padding_idx] = 0  # the padding row gets no gradient in the layer, and its update none either
        update = update * row.T + (update * (1 - row.T)).detach()
    stored = host.weight + (update.T if shape is None or name.startswith("transformers") else update)
    state = {"weight": stored} | ({"bias": host.bias} if getattr(host, "bias", None) is not None else {})
    expected = torch.func.functional_call(make().double(), state, (x,))
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(expected.square().sum(), [a, b, *([x] if shape else [])])
    torch.testing.assert_close(gradients, found)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("name", "targets", "block"),
    [
        ("llama", ["mlp"], lambda m: (m.model.layers[1].mlp, m.model.layers[1].mlp)),
        ("llama", ["feedforward"], lambda m: (m.model.layers[1].mlp, m.model.layers[1].mlp.down_proj)),
        ("gpt2", ["mlp"], lambda m: (m.transformer.h[1].mlp, m.transformer.h[1].mlp)),
        ("plain", ["feedforward"], lambda m: (lambda x: b1(m).fc2(F.relu(b1(m).fc1(x))), b1(m).fc2)),
        ("bert", ["feedforward"], lambda m: (lambda x: b1(m).output.dense(b1(m).intermediate(x)), b1(m).output.dense)),
    ],
    ids=["llama mlp", "llama", "gpt2 mlp", "plain", "bert"],
)
def test_krona_beside_a_block_is_the_papers_sum(name, targets, block, residual):
    model = fill(lp.inject(MODELS[name](), lp.KronABlock(scale=3, targets=targets, residual=residual))).double()
    run, host = block(model)
    run_base, _ = block(MODELS[name]().double())
    adapter = host.peft["krona_block"]
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    trained = [adapter.a, adapter.b, *([adapter.residual] if residual else [])]
    y = run(x)
    fresh = [t.detach().clone().requires_grad_() for t in trained]
    expected = run_base(x) + 3 * x @ torch.kron(fresh[0], fresh[1])
    if residual:
        expected = expected + fresh[2] * x
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), [x, *trained]), torch.autograd.grad(expected.square().sum(), [x, *fresh])
    )


def b1(model):
    """The second block of two of the models."""
    return model.trunk.blocks[1] if hasattr(model, "trunk") else model.bert.encoder.layer[1]


@pytest.mark.parametrize(
    "method", [lp.LoRA(rank=2, decompose=True, targets=["layer"]), lp.LoRA(rank=2, init="pissa", targets=["layer"])]
)
def test_variants_on_an_embedding_are_a_table_with_the_updated_weight(method):
    model = fill(lp.inject(Net(nn.Embedding(10, 6).double()), method))
    host, adapter = only(model)
    x = torch.tensor([[0, 3, 9], [4, 4, 1]])
    update = 8 * adapter.b @ adapter.a
    if method.decompose:
        v = host.weight.T + update
        expected = adapter.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)
    else:
        expected = host.weight.T + update - 8 * adapter.b0 @ adapter.a0
    torch.testing.assert_close(model(x), expected.T[x])
    torch.testing.assert_close(lp.merge(model)(x), expected.T[x])


def test_lora_on_parts_of_a_fused_layer_leaves_the_other_rows_alone():
    model = fill(lp.inject(MODELS["gpt2"](), lp.LoRA(rank=2, alpha=4))).double()
    hosts = {(name, key): (host, adapter) for name, host, key, adapter in lp.adapters(model)}
    assert len(hosts) == 6
    base = MODELS["gpt2"]().double()
    x = torch.randn(3, 32, dtype=torch.float64)
    host = model.transformer.h[1].attn.c_attn
    y, y0 = host(x), base.transformer.h[1].attn.c_attn(x)
    assert torch.equal(y[:, 32:64], y0[:, 32:64])
    for part, start in (("query", 0), ("value", 64)):
        _, adapter = hosts["transformer.h.1.attn.c_attn", f"lora_{part}"]
        torch.testing.assert_close(
            y[:, start : start + 32], y0[:, start : start + 32] + 2 * x @ adapter.a.T @ adapter.b.T
        )


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


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompt_tuning_is_a_longer_row_of_embeddings(name):
    model = fill(lp.inject(MODELS[name](), lp.PromptTuning(length=3)))
    _, adapter = only(model)
    base, x = MODELS[name](), tokens()
    embedded = torch.cat([adapter.prompt.expand(2, -1, -1), base.get_input_embeddings()(x)], 1)
    torch.testing.assert_close(logits(model(x)), logits(base(inputs_embeds=embedded))[:, 3:])


def test_prompt_tuning_starts_as_asked():
    model, base = MODELS["llama"](), MODELS["llama"]()
    _, adapter = only(lp.inject(model, lp.PromptTuning(length=50)))
    assert adapter.prompt.min() >= -0.5
    assert adapter.prompt.max() <= 0.5
    assert adapter.prompt.std().item() == pytest.approx(12**-0.5, rel=0.05)
    _, adapter = only(lp.inject(MODELS["llama"](), lp.PromptTuning(length=50, init="vocabulary")))
    rows = base.get_input_embeddings().weight
    found = (adapter.prompt[:, None] == rows[None]).all(-1)
    assert found.any(1).all()
    assert len(found.float().argmax(1).unique()) == 50


needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
PEERS = {
    "linear": (lambda: nn.Linear(6, 10), lambda: torch.randn(4, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, stride=2), lambda: torch.randn(2, 6, 7, 7)),
    "embedding": (lambda: nn.Embedding(10, 6), lambda: torch.randint(10, (3, 4))),
    "transformers conv1d": (conv1d, lambda: torch.randn(4, 6)),
}


@needs_peft
@pytest.mark.parametrize("name", PEERS)
def test_lora_equals_peft(name):
    import peft

    make, inputs = PEERS[name]
    base, x = Net(make()), inputs()
    other = Net(make())
    other.load_state_dict(base.state_dict())
    model = fill(lp.inject(base, lp.LoRA(rank=2, alpha=5, targets=["layer"])))
    _, adapter = only(model)
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["layer"], fan_in_fan_out=name.startswith("transformers")
    )
    theirs = peft.get_peft_model(other, config)
    layer = theirs.base_model.model.layer
    with torch.no_grad():
        for ours, factors in ((adapter.a, ("lora_A", "lora_embedding_A")), (adapter.b, ("lora_B", "lora_embedding_B"))):
            factor = getattr(layer, factors[name == "embedding"])["default"]
            weight = factor if isinstance(factor, nn.Parameter) else factor.weight
            weight.copy_(ours.view(weight.shape))
        difference = (model(x) - theirs(x)).abs().max().item()
    print(f"{name}: max difference {difference:.1e}")
    assert difference <= 2e-6


@needs_peft
@pytest.mark.parametrize("tokens_", [4, 400], ids=["few rows", "many rows"])
def test_krona_equals_peft(tokens_):
    import peft

    base, x = Net(nn.Linear(48, 80)), torch.randn(tokens_, 48)
    other = Net(nn.Linear(48, 80))
    other.load_state_dict(base.state_dict())
    config = peft.LoKrConfig(r=64, alpha=32, target_modules=["layer"], decompose_factor=4)
    theirs = peft.get_peft_model(other, config)
    layer = theirs.base_model.model.layer
    one, two = layer.lokr_w1["default"], layer.lokr_w2["default"]
    method = lp.KronA(scale=32 / 64, targets=["layer"], shape_a=list(one.T.shape))
    model = lp.inject(base, method)
    _, adapter = only(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for ours, factor in ((adapter.a, one), (adapter.b, two)):
            factor.copy_(nn.init.normal_(ours, std=0.3).T)
        difference = (model(x) - theirs(x)).abs().max().item()
    print(f"{tokens_} rows: max difference {difference:.1e}")
    assert difference <= 2e-6


@needs_peft
def test_prompt_tuning_equals_peft():
    import peft

    model = fill(lp.inject(MODELS["llama"](), lp.PromptTuning(length=3)))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(MODELS["llama"](), config).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(only(model)[1].prompt)
        difference = (model(tokens()).logits - theirs(tokens()).logits[:, 3:]).abs().max().item()
    print(f"prompt tuning: max difference {difference:.1e}")
    assert difference <= 2e-6
