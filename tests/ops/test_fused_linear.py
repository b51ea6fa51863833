"""One product with an updated weight equals the plain formula, in value and gradient, wherever it runs."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from lightning_peft.core import weight_cache
from lightning_peft.ops.fused_linear import WeightUpdateSpec, rebuilding_is_cheaper, updated_linear
from lightning_peft.ops.low_rank_products import dropped_low_rank
from lightning_peft.ops.parametrizations import (
    DoRAParametrization,
    HadamardParametrization,
    KroneckerParametrization,
    LowRankParametrization,
)

OUT, IN = 12, 8


def plain_low_rank(w, a, b):
    return w + 0.7 * b @ a


def plain_decomposed(w, a, b, m):
    v = w + 0.7 * b @ a
    return m[:, None] * v / v.detach().norm(dim=1, keepdim=True)


def plain_hadamard(w, x1, y1, x2, y2):
    return w + (x1 @ y1.T) * (x2 @ y2.T)


def plain_tanh(w, x1, y1, x2, y2):
    return w + (x1 @ y1.T).tanh() * (x2 @ y2.T).tanh()


def plain_personal(w, x1, y1, x2, y2):
    return w + (x1 @ y1.T) * (x2 @ y2.T + 1)


def plain_kronecker(w, a, b):
    return w + 0.7 * torch.kron(a, b).T


PAIRS = [(OUT, 3), (IN, 3), (OUT, 3), (IN, 3)]
FORMS = {
    "low rank": (LowRankParametrization(0.7), plain_low_rank, [(3, IN), (OUT, 3)]),
    "decomposed": (DoRAParametrization(0.7), plain_decomposed, [(3, IN), (OUT, 3), (OUT,)]),
    "hadamard": (HadamardParametrization(tanh=False, shift=0.0), plain_hadamard, PAIRS),
    "hadamard of tanh": (HadamardParametrization(tanh=True, shift=0.0), plain_tanh, PAIRS),
    "hadamard with a shift": (HadamardParametrization(tanh=False, shift=1.0), plain_personal, PAIRS),
    "kronecker": (KroneckerParametrization(0.7), plain_kronecker, [(2, 4), (4, 3)]),
}


def tensors(shapes, dtype=torch.float64):
    torch.manual_seed(3)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("stored", ["plain", "transposed"])
@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients_are_the_formulas(name, stored, bias):
    form, plain, shapes = FORMS[name]
    x, offset, *factors = tensors([(2, 5, IN), (OUT,), *shapes])
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    weight = weight.T.contiguous().T if stored == "transposed" else weight
    offset = offset if bias else None
    y = updated_linear(x, weight, offset, [WeightUpdateSpec(form, (0, OUT), tuple(factors))])
    expected = F.linear(x, plain(weight, *factors), offset)
    torch.testing.assert_close(y, expected)
    inputs = [t for t in (x, offset, *factors) if t is not None]
    for loss in (torch.sum, lambda t: t.square().sum()):
        found = torch.autograd.grad(loss(y), inputs, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(loss(expected), inputs, retain_graph=True))


def test_parts_update_their_rows_only():
    x, a1, b1, a2, b2 = tensors([(7, IN), (2, IN), (4, 2), (3, IN), (5, 3)])
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    updates = [
        WeightUpdateSpec(LowRankParametrization(0.5), (0, 4), (a1, b1)),
        WeightUpdateSpec(LowRankParametrization(2.0), (7, 12), (a2, b2)),
    ]
    y = updated_linear(x, weight, None, updates)
    expected = F.linear(x, weight) + torch.cat([0.5 * x @ a1.T @ b1.T, x.new_zeros(7, 3), 2 * x @ a2.T @ b2.T], 1)
    torch.testing.assert_close(y, expected)
    inputs = [x, a1, b1, a2, b2]
    found, wanted = (torch.autograd.grad(t.square().sum(), inputs) for t in (y, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", FORMS)
def test_works_in_autocasts_type(name):
    form, plain, shapes = FORMS[name]
    x, offset, *factors = tensors([(64, IN), (OUT,), *shapes], torch.float32)
    weight = torch.randn(OUT, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = updated_linear(x, weight, offset, [WeightUpdateSpec(form, (0, OUT), tuple(factors))])
        assert y.dtype == torch.bfloat16
        gradients = torch.autograd.grad(y.square().mean(), [x, *factors])  # inside autocast, where casts could creep in
    expected = F.linear(x, plain(weight, *factors), offset)
    wanted = torch.autograd.grad(expected.square().mean(), [x, *factors])
    torch.testing.assert_close(y.float(), expected, atol=0.03 * expected.abs().max().item(), rtol=0.02)
    for gradient, right in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - right).norm() <= 0.05 * right.norm()


@pytest.mark.parametrize("tokens", [41, 5501], ids=["float mask", "packed mask"])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_drops_inputs_of_the_update_alone(p, tokens):
    x, a, b = tensors([(3, tokens, IN), (2, IN), (OUT, 2)])
    torch.manual_seed(0)
    y = dropped_low_rank(x, torch.eye(IN, dtype=torch.float64), torch.eye(IN, dtype=torch.float64), 1.0, p)
    kept = (y != 0).detach()
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.06)
    torch.manual_seed(0)
    z = dropped_low_rank(x, a, b, 0.7, p)
    expected = 0.7 * (x * kept / (1 - (p if tokens == 41 else round(p * 65536) / 65536))) @ a.T @ b.T
    torch.testing.assert_close(z, expected)
    found, wanted = (torch.autograd.grad(t.square().sum(), [x, a, b]) for t in (z, expected))
    torch.testing.assert_close(found, wanted)


def test_dropout_is_fair():
    torch.manual_seed(0)
    eye = torch.eye(4)
    y = dropped_low_rank(torch.ones(100_000, 4), eye, eye, 1.0, 0.1)
    kept = (y != 0).float()
    assert kept.mean(0).sub(0.9).abs().max() < 0.005
    assert torch.corrcoef(kept.T).fill_diagonal_(0).abs().max() < 0.015
    assert y.mean().item() == pytest.approx(1, abs=0.005)


def test_the_cost_rule_counts_tokens_against_width():
    weight = torch.empty(64, 64)
    update = WeightUpdateSpec(LowRankParametrization(1.0), (0, 64), (torch.empty(2, 64), torch.empty(64, 2)))
    assert not rebuilding_is_cheaper([update], torch.empty(31, 64), weight)
    assert rebuilding_is_cheaper([update], torch.empty(4, 8, 64), weight)
    dense = WeightUpdateSpec(HadamardParametrization(tanh=False, shift=0.0), (0, 64), ())
    assert rebuilding_is_cheaper([dense], torch.empty(1, 64), weight)


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


METHODS = {
    "lora": lp.LoRA(targets=["layer"], rank=2),
    "dora": lp.LoRA(targets=["layer"], rank=2, decompose=True),
}


def disturbed(method, dtype=torch.float64):
    torch.manual_seed(0)
    model = Twice().to(dtype)
    lp.inject(model, method)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def gradients(model, call, tokens):
    x = torch.randn(tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = call(model, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), [x, *trained])


def plain(model, x):
    """The same map through weights that autograd builds."""
    ((_, host, _, adapter),) = lp.adapters(model)
    weight = adapter.updated(host.weight)
    return F.linear(torch.tanh(F.linear(x, weight, host.bias)), weight, host.bias)


WAYS = {
    "as it is": lambda model, x: model(x),
    "checkpointed": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "copied": lambda model, x: copy.deepcopy(model)(x) * 0 + model(x),
    "compiled": lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager")(x),
}


@pytest.mark.parametrize("tokens", [3, 64], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("way", [*list(WAYS)[:-1], pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_used_twice_however_it_is_called(method, way, tokens):
    torch._dynamo.reset()
    model = disturbed(METHODS[method])
    torch.testing.assert_close(gradients(model, WAYS[way], tokens), gradients(model, plain, tokens))


VECTOR = METHODS | {"fedpara": lp.FedPara(targets=["layer"], rank=2), "krona": lp.KronA(targets=["layer"])}


@pytest.mark.parametrize("method", VECTOR)
def test_a_vector_is_a_batch_of_one_row(method):
    model = disturbed(VECTOR[method])
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(16, dtype=torch.float64)
    y, rows = model(x), model(x[None])
    torch.testing.assert_close(y, rows[0])
    results = [torch.autograd.grad(each.square().sum(), trained) for each in (y, rows)]
    torch.testing.assert_close(*results)


def test_a_second_derivative_can_be_taken():
    model = disturbed(METHODS["lora"])
    x = torch.randn(64, 16, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for call in (WAYS["as it is"], plain):
        first = torch.autograd.grad(call(model, x).square().sum(), trained, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained))
    torch.testing.assert_close(*results)


def test_frozen_first_factor_saves_only_the_inner_product():
    model = disturbed(METHODS["lora"], torch.float32)
    ((_, _, _, adapter),) = lp.adapters(model)
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    for tokens, trained in ((64, True), (8192, True), (64, False)):
        x = torch.randn(tokens, 16)
        adapter.a.requires_grad_(trained)
        sizes.clear()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.layer(x)
        # Few tokens save the inner product as well; many save their input alone.
        expected = (tokens * 16 if trained else 0) + (tokens * 2 if tokens == 64 else 0)
        assert sum(n for key, n in sizes.items() if key not in own) == expected


def change_by_optimizer(adapter, host):
    optimizer = torch.optim.SGD([adapter.b], lr=1.0)
    adapter.b.grad = torch.ones_like(adapter.b)
    optimizer.step()


CHANGES = {
    "step": change_by_optimizer,
    "data": lambda adapter, host: adapter.a.data.add_(1),
    "new data": lambda adapter, host: setattr(adapter.a, "data", adapter.a.data + 1),
    "state": lambda adapter, host: adapter.load_state_dict({k: v + 1 for k, v in adapter.state_dict().items()}),
    "base": lambda adapter, host: host.weight.add_(1),
    "data of the base": lambda adapter, host: host.weight.data.copy_(host.weight + 1),
    "a number of the base": lambda adapter, host: host.weight.numpy().__setitem__((3, 5), 2.0),
    "order of the base": lambda adapter, host: host.weight.data.copy_(host.weight.flip(0).clone()),
    "columns of the base": lambda adapter, host: host.weight.data.copy_(host.weight.flip(1).clone()),
    "new base": lambda adapter, host: setattr(host, "weight", nn.Parameter(host.weight + 1, requires_grad=False)),
}


def cached(adapter):
    return None if adapter.weight_cache is None else adapter.weight_cache.weight


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_kept_weight_is_given_up_when_anything_changes(method, change):
    """In evaluation on the CPU the updated weight is built once."""
    model = disturbed(METHODS[method]).eval()
    ((_, host, _, adapter),) = lp.adapters(model)
    x = torch.randn(600, 16, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        first = cached(adapter)
        torch.testing.assert_close(model(x), plain(model, x))
        assert cached(adapter) is first is not None
        if change == "step":
            with torch.enable_grad():
                CHANGES[change](adapter, host)
        else:
            CHANGES[change](adapter, host)
        torch.testing.assert_close(model(x), plain(model, x))
        assert cached(adapter) is not first
    model.train()
    assert cached(adapter) is None


def test_kept_weights_have_a_limit_and_copies_have_none(monkeypatch):
    before = weight_cache.WeightCache.total
    model = disturbed(METHODS["lora"]).eval()
    ((_, host, _, adapter),) = lp.adapters(model)
    x = torch.randn(600, 16, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        assert weight_cache.WeightCache.total - before == host.weight.nbytes
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            ((*_, other),) = lp.adapters(twin)
            assert cached(other) is None
        model.train().eval()
        monkeypatch.setattr(weight_cache, "LIMIT", before)
        torch.testing.assert_close(model(x), plain(model, x))
        assert cached(adapter) is None
    del twin, other
    assert weight_cache.WeightCache.total == before


@pytest.mark.parametrize("narrow", [False, True], ids=["wide factors", "narrow factors"])
@pytest.mark.parametrize("training", [True, False])
def test_a_small_update_of_a_narrow_weight_is_not_rounded_away(training, narrow):
    model = Twice().bfloat16()
    nn.init.zeros_(model.layer.bias)
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([1.0, -1.0]).repeat(16, 8))  # which 1e-3 does not change in 16 bits
    lp.inject(model, lp.LoRA(targets=["layer"], rank=1, alpha=1)).train(training)
    ((_, _, _, adapter),) = lp.adapters(model)
    for factor, value in ((adapter.a, 1.0), (adapter.b, 1e-3)):
        factor.data = torch.full_like(factor, value, dtype=torch.bfloat16 if narrow else torch.float32)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model.layer(torch.ones(64, 16, dtype=torch.bfloat16))
        torch.testing.assert_close(y.float(), torch.full((64, 16), 0.016), rtol=0.01, atol=0)
