"""FedPara and pFedPara against formulas written afresh, and LoHa of an installed peer."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, tokens
from single_layers import LAYERS, Net, fill, only
from torch import nn

import lightning_peft as lp

KINDS = {
    "plain": {},
    "tanh": {"tanh": True},
    "personalized": {"personalized": True},
    "without cores": {"cores": False},
}


def update_afresh(adapter, kind):
    """The weight's update, entry by entry of its definition."""
    factors = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    matrices = []
    for i in (1, 2):
        x, y = factors[f"x{i}"], factors[f"y{i}"]
        if f"t{i}" in factors:
            matrices.append(torch.einsum("pq...,op,iq->oi...", factors[f"t{i}"], x, y))
        else:
            matrices.append((x @ y.T).reshape(adapter.shape))
    one, two = matrices
    update = {
        "tanh": lambda: one.tanh() * two.tanh(),
        "personalized": lambda: one * two + one,
    }.get(kind, lambda: one * two)()
    return update, list(factors.values())


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n in LAYERS if n != "embedding"])
def test_it_is_a_layer_with_the_updated_weight(name, kind, rank):
    make, shape = LAYERS[name]
    base = make().double()
    if rank > 3 and "grouped" in name:
        rank = 3  # a group has three inputs
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    model = fill(lp.inject(Net(base), lp.FedPara(rank=rank, targets=["layer"], **KINDS[kind])))
    host, adapter = only(model)
    update, factors = update_afresh(adapter, kind)
    torch.testing.assert_close(adapter.delta(), update)
    stored = host.weight.detach() + (update.T if name.startswith("transformers") else update)
    state = {"weight": stored} | ({"bias": host.bias} if host.bias is not None else {})
    expected = torch.func.functional_call(make().double(), state, (x,))
    y = model(x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), [x, *adapter.parameters()])
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), [x, *factors]))


@pytest.mark.parametrize("personalized", [False, True])
def test_a_narrow_rank_on_a_wide_layer_takes_the_product_of_columns(personalized):
    model = fill(
        lp.inject(Net(nn.Linear(64, 96).double()), lp.FedPara(rank=2, personalized=personalized, targets=["layer"]))
    )
    host, adapter = only(model)
    assert adapter.skinny
    a, b = adapter.pair()
    torch.testing.assert_close(b @ a, adapter.delta())
    for count in (2, 100):
        x = torch.randn(count, 64, dtype=torch.float64)
        torch.testing.assert_close(model(x), F.linear(x, host.weight + adapter.delta(), host.bias))


def test_rows_of_an_embedding_are_looked_up():
    model = fill(lp.inject(Net(nn.Embedding(10, 6).double()), lp.FedPara(rank=2, targets=["layer"])))
    host, adapter = only(model)
    x = torch.tensor([[0, 3, 9], [4, 4, 1]])
    torch.testing.assert_close(model(x), (host.weight + adapter.delta().T)[x])


def test_ranks_by_gamma():
    method = lp.FedPara(gamma=0.5)
    assert method.rank_of(256, 784) == 56
    assert method.rank_of(62, 256) == 16
    assert lp.FedPara().rank_of(256, 256) == 16
    assert lp.FedPara().rank_of(10, 6) == 3
    for shape in [(256, 256, 3, 3), (64, 3, 5, 5), (96, 48)]:
        rank = lp.FedPara(gamma=1.0).rank_of(*shape)
        layer = nn.Conv2d(shape[1], shape[0], shape[2], bias=False) if len(shape) > 2 else nn.Linear(48, 96, bias=False)
        if rank <= min(shape[:2]):
            sizes = [lp.summary(lp.inject(Net(layer), lp.FedPara(rank=rank, targets=["layer"]))).trainable]
            assert sizes[0] <= layer.weight.numel()


def test_an_update_can_have_full_rank():
    model = fill(lp.inject(Net(nn.Linear(16, 16)), lp.FedPara(targets=["layer"])))
    _, adapter = only(model)
    assert adapter.x1.shape == (16, 4)
    assert torch.linalg.matrix_rank(adapter.delta().detach()) == 16


def test_the_jacobian_correction_adds_its_gradient_and_nothing_else():
    """R = weight / 2 ||W' - (W - step J)||^2, with the gradients of factors written out."""
    method = lp.FedPara(rank=2, targets=["layer"], jacobian_weight=3.0, jacobian_step=0.2)
    model = fill(lp.inject(Net(nn.Linear(6, 10).double()), method)).train()
    host, adapter = only(model)
    batches = [torch.randn(4, 6, dtype=torch.float64) for _ in range(2)]
    for x in batches:  # gradients accumulate
        model(x).square().sum().backward()
    weight = (host.weight + adapter.delta()).detach()
    jacobian = sum(2 * F.linear(x, weight, host.bias).T @ x for x in batches).detach()
    penalty = method.penalty([adapter])
    found = torch.autograd.grad(penalty, list(adapter.parameters()))
    x1, y1, x2, y2 = (p.detach().clone().requires_grad_() for p in adapter.factors())
    by_one, by_two = jacobian * (x2 @ y2.T), jacobian * (x1 @ y1.T)
    step = 0.2
    new = ((x1 - step * by_one @ y1) @ (y1 - step * by_one.T @ x1).T) * (
        (x2 - step * by_two @ y2) @ (y2 - step * by_two.T @ x2).T
    )
    expected = 1.5 * (new - ((x1 @ y1.T) * (x2 @ y2.T) - step * jacobian)).square().sum()
    torch.testing.assert_close(penalty, expected)
    named = dict(zip(("x1", "y1", "x2", "y2"), torch.autograd.grad(expected, [x1, y1, x2, y2]), strict=True))
    torch.testing.assert_close(dict(zip((n for n, _ in adapter.named_parameters()), found, strict=True)), named)
    assert method.penalty([adapter]) is None  # used up
    with torch.no_grad():
        model(batches[0])
    model.eval()(batches[0]).sum().backward()
    assert adapter.jacobian is None


def test_what_is_global_and_what_is_local():
    method = lp.FedPara(rank=2, personalized=True, targets=["attention.value"])
    model = fill(lp.inject(MODELS["bert"](), method, also_train=["classifier"]))
    shared, own = lp.global_state(model), lp.local_state(model)
    assert {key.rpartition(".")[2] for key in own} == {"x2", "y2"}
    assert {key.rpartition(".")[2] for key in shared} == {"x1", "y1", "weight", "bias"}
    assert len(own) == 6
    other = fill(lp.inject(MODELS["bert"](), method, also_train=["classifier"]))
    with torch.no_grad():
        for *_, adapter in lp.adapters(other):
            adapter.x1.zero_()
            adapter.x2.zero_()
    before = copy.deepcopy(lp.local_state(other))
    result = other.load_state_dict(shared, strict=False)
    assert not result.unexpected_keys
    assert all(torch.equal(lp.global_state(other)[key], value) for key, value in shared.items())
    assert all(torch.equal(lp.local_state(other)[key], value) for key, value in before.items())
    other.load_state_dict(own, strict=False)
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)
    assert lp.local_state(lp.inject(MODELS["bert"](), lp.LoRA())) == {}


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("name", ["linear", "conv2d strided"])
def test_it_equals_loha_of_peft(name):
    import peft

    make, shape = LAYERS[name]
    base, x = Net(make()), torch.randn(shape)
    other = copy.deepcopy(base)
    model = fill(lp.inject(base, lp.FedPara(rank=2, targets=["layer"])))
    _, adapter = only(model)
    config = peft.LoHaConfig(r=2, alpha=2, target_modules=["layer"], use_effective_conv2d=True)
    theirs = peft.get_peft_model(other, config)
    layer = theirs.base_model.model.layer
    with torch.no_grad():
        for i in (1, 2):
            ours = {k: getattr(adapter, f"{k}{i}") for k in "xy"}
            if adapter.t1 is None:
                getattr(layer, f"hada_w{i}_a")["default"].copy_(ours["x"])
                getattr(layer, f"hada_w{i}_b")["default"].copy_(ours["y"].T)
            else:
                getattr(layer, f"hada_t{i}")["default"].copy_(getattr(adapter, f"t{i}"))
                getattr(layer, f"hada_w{i}_a")["default"].copy_(ours["x"].T)
                getattr(layer, f"hada_w{i}_b")["default"].copy_(ours["y"].T)
        difference = (model(x) - theirs(x)).abs().max().item()
        size = theirs(x).abs().max().item()
    print(f"{name}: max difference {difference:.1e} of {size:.1f}")
    assert difference <= 2e-6 * max(1.0, size)


def test_without_cores_a_kernels_places_count_as_inputs_for_the_largest_rank_too():
    net = nn.Sequential(nn.Conv2d(2, 8, 2))
    ((*_, adapter),) = lp.adapters(lp.inject(net, lp.FedPara(targets=["0"], rank=8, cores=False)))
    assert (adapter.x1.shape, adapter.y1.shape) == ((8, 8), (8, 8))
    with pytest.raises(ValueError, match="rank at 0 must be at most 2, got 8"):
        lp.inject(nn.Sequential(nn.Conv2d(2, 8, 2)), lp.FedPara(targets=["0"], rank=8))
