"""LoRA against formulas written afresh, in float64, and an installed peer with copied weights."""

import pytest
import torch
from models import MODELS
from single_layers import LAYERS, Net, conv1d, fill, needs_peft, only
from torch import nn

import lightning_peft as lp


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
