"""KronA against formulas written afresh in float64, and against an installed peer."""

import copy

import pytest
import torch
from single_layers import LAYERS, Net, fill, needs_peft, only
from torch import nn

import lightning_peft as lp
from lightning_peft.methods.families.kronecker import shape_of_a

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


def test_krona_adapts_weights_that_torchs_attention_reads():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2)
    x = torch.randn(2, 5, 8)
    base = copy.deepcopy(encoder)
    fill(lp.inject(encoder, lp.KronA(targets=["attention.query", "attention.output"], scale=2)))
    expected = copy.deepcopy(base)
    for name, _, _, adapter in lp.adapters(encoder):
        layer = expected.get_submodule(name)
        weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
        weight.data[slice(*adapter.rows.ends)] += 2 * torch.kron(adapter.a.detach(), adapter.b.detach()).T
    torch.testing.assert_close(encoder(x), expected(x))
    assert (encoder(x) - base(x)).abs().max() > 1e-2
    torch.testing.assert_close(lp.merge(encoder)(x), expected(x))


def test_shapes_need_the_fewest_parameters_and_have_the_highest_rank():
    def count(a1, a2, inputs, outputs):
        return a1 * a2 + inputs // a1 * (outputs // a2)

    for inputs, outputs in ((768, 768), (768, 3072), (4096, 11008), (30522, 384), (7, 13), (1, 6)):
        a1, a2 = shape_of_a("x", inputs, outputs, None, None)
        pairs = [
            (i, j) for i in range(1, inputs + 1) if inputs % i == 0 for j in range(1, outputs + 1) if outputs % j == 0
        ]
        assert count(a1, a2, inputs, outputs) == min(count(*pair, inputs, outputs) for pair in pairs)
    assert shape_of_a("x", 768, 768, None, None) == (32, 24)
    assert shape_of_a("x", 768, 768, None, 20) == (16, 16)
    assert shape_of_a("x", 30522, 7, None, 5) == (3, 1)
