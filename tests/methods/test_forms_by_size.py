"""Forms that methods on activations, FedPara and KronA take at each size: values, gradients, saved bytes, operators.

Each case is a layer, an input on one side of a rule, and the same computation written with plain operators.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from counting import operators
from single_layers import Net, only
from torch import nn

import lightning_peft as lp
from lightning_peft.methods.families.bias_and_scale import BiasAndScale


def ia3(of_inputs):
    lists = (["layer"], [])
    targets, feedforward_targets = lists[::-1] if of_inputs else lists
    return lp.IA3(targets=targets, feedforward_targets=feedforward_targets)


class Affine(lp.core.Method):
    """Shifts and scales the output, as in LLaMA-Adapter's second version."""

    def adapters(self, model):
        yield "layer", BiasAndScale(model.layer)


def block(width):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def bottleneck(x, p, activation):
    biases = p.get("down_bias"), p.get("up_bias")
    return F.linear(activation(F.linear(x, p["down"], biases[0])), p["up"], biases[1])


def hadamard(p, tanh=False, shift=0.0):
    one, two = p["x1"] @ p["y1"].T, p["x2"] @ p["y2"].T
    return one.tanh() * two.tanh() if tanh else one * (two + shift)


def updated(change):
    """Return the formula of a layer whose weight is changed."""
    return lambda layer, x, p: F.linear(x, layer.weight + change(p), layer.bias)


WITHOUT_HEADS = {"targets": ["layer"], "train_norms": False, "train_head": False}
BLOCKS = {"targets": ["layer"], "exclude": ["layer.*"]}
FEDPARA = {"targets": ["layer"]}
FORMULAS = {
    "ia3 outputs": (ia3(False), lambda layer, x, p: layer(x) * p["scales"]),
    "ia3 inputs": (ia3(True), lambda layer, x, p: layer(x * p["scales"])),
    "added bias": (lp.BitFit(targets=["layer"], add_missing=True), lambda layer, x, p: layer(x) + p["bias"]),
    "affine": (Affine(name="affine"), lambda layer, x, p: (layer(x) + p["bias"]) * p["scale"]),
    "bottleneck": (
        lp.Bottleneck(size=5, **WITHOUT_HEADS),
        lambda layer, x, p: layer(x) + bottleneck(layer(x), p, F.gelu),
    ),
    "parallel": (
        lp.ParallelAdapter(size=5, **BLOCKS),
        lambda layer, x, p: layer(x) + 4 * bottleneck(x, p, F.relu),
    ),
    "krona": (lp.KronA(targets=["layer"], scale=3), updated(lambda p: 3 * torch.kron(p["a"], p["b"]).T)),
    "krona, B first": (
        lp.KronA(targets=["layer"], scale=3, shape_a=[2, 16]),
        updated(lambda p: 3 * torch.kron(p["a"], p["b"]).T),
    ),
    "krona beside a block": (
        lp.KronABlock(scale=3, **BLOCKS),
        lambda layer, x, p: layer(x) + 3 * x @ torch.kron(p["a"], p["b"]),
    ),
    "krona and residual": (
        lp.KronABlock(scale=3, residual=True, **BLOCKS),
        lambda layer, x, p: layer(x) + 3 * x @ torch.kron(p["a"], p["b"]) + p["residual"] * x,
    ),
    "fedpara": (lp.FedPara(rank=2, **FEDPARA), updated(hadamard)),
    "fedpara, rank 12": (lp.FedPara(rank=12, **FEDPARA), updated(hadamard)),
    "fedpara, rank 11": (lp.FedPara(rank=11, **FEDPARA), updated(hadamard)),
    "pfedpara": (lp.FedPara(rank=2, personalized=True, **FEDPARA), updated(lambda p: hadamard(p, shift=1.0))),
    "fedpara, tanh": (lp.FedPara(rank=2, tanh=True, **FEDPARA), updated(lambda p: hadamard(p, tanh=True))),
}  # fmt: skip
BESIDE_BLOCKS = ("parallel", "krona beside a block", "krona and residual")

# name, width, tokens, operators of training and of evaluation, bytes of float32 saved beside x and parameters
CASES = [
    ("ia3 outputs", 64, 2048, 15, 5, 64 * 2048 * 4),  # 2**17 numbers: a plain product saves what it scales
    ("ia3 outputs", 64, 2049, None, None, 64 * 2049 * 4),  # into the weight: the scaled output alone
    ("ia3 outputs", 512, 257, None, 5, 512 * 257 * 4),  # few tokens for a weight: the scaled output
    ("ia3 inputs", 64, 2048, 15, 5, 0),
    ("ia3 inputs", 64, 2049, None, None, 0),
    ("affine", 64, 2048, 19, 6, 64 * 2048 * 4),
    ("affine", 64, 2049, None, None, 64 * 2049 * 4),
    ("added bias", 64, 3, 12, 4, 0),
    ("bottleneck", 64, 3, 45, 14, 3 * (64 + 5 + 5) * 4),
    ("parallel", 64, 3, 54, 19, 3 * (128 + 5) * 4),
    ("krona", 64, 1, 33, 10, 64 * 4),
    ("krona", 64, 31, 37, 12, 31 * 64 * 4),
    ("krona", 64, 32, 36, None, 64 * 64 * 4),  # an updated weight, as tokens move more numbers than it has
    ("krona", 192, 95, 37, 12, 95 * 192 * 4 * 12 // 16),
    ("krona", 192, 96, None, None, 0),  # a weight of more than 2**14 numbers is built again in backward
    ("krona, B first", 64, 3, 37, None, 3 * 64 * 4 // 8),
    ("krona beside a block", 64, 3, 49, 17, 3 * (128 + 64) * 4),
    ("krona and residual", 64, 3, 58, 18, 3 * (128 + 64) * 4),
    ("fedpara", 128, 3, 34, None, 0),  # 2**14 numbers: W1 and W2, built again in backward
    ("fedpara", 192, 3, 53, None, (2 * 192 * 4 + 3 * 4) * 4),  # products of columns and x times one of them
    ("fedpara", 192, 96, None, None, 2 * 192 * 4 * 4),
    ("fedpara, rank 11", 272, 8, 53, None, (2 * 272 + 8) * 121 * 4),  # with few tokens, as many numbers as a weight
    ("fedpara, rank 12", 272, 8, 34, None, 0),
    ("pfedpara", 128, 3, 36, None, 0),
    ("pfedpara", 192, 3, 61, None, None),
    ("fedpara, tanh", 192, 3, None, None, 0),
]


def case(name, width, dtype=torch.float64):
    """Return an adapted layer, its parts by the formula, and the formula."""
    torch.manual_seed(0)
    method, formula = FORMULAS[name]
    layer = block(width) if name in BESIDE_BLOCKS else nn.Linear(width, width, bias=name != "added bias")
    layer = layer.to(dtype).requires_grad_(False)
    net = lp.inject(Net(copy.deepcopy(layer)), method)
    _, adapter = only(net)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return net, layer, adapter, formula


def saved_bytes(net, x):
    """Return the bytes of all storages that a forward saves, each once, without those of x and of parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *net.parameters())}
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = net(x)
    assert y.requires_grad
    return sum(size for address, size in found.items() if address not in known)


@pytest.mark.parametrize(("name", "width", "tokens"), [entry[:3] for entry in CASES])
def test_each_form_has_the_values_and_gradients_of_the_formula(name, width, tokens):
    net, layer, adapter, formula = case(name, width)
    x = torch.randn(1, tokens, width, dtype=torch.float64, requires_grad=True)
    fresh = {key: p.detach().clone().requires_grad_() for key, p in adapter.named_parameters()}
    expected, g = formula(layer, x, fresh), torch.randn(1, tokens, width, dtype=torch.float64)
    y = net(x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y, [x, *adapter.parameters()], g)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [x, *fresh.values()], g), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), expected)
        torch.testing.assert_close(net(x[0]), expected[0])  # without a batch, and once more


@pytest.mark.parametrize(("name", "width", "tokens", "training", "evaluation", "saved"), CASES)
def test_each_form_has_its_operators_and_saved_bytes(name, width, tokens, training, evaluation, saved):
    net, *_ = case(name, width, torch.float32)
    x = torch.randn(1, tokens, width, requires_grad=True)
    if saved is not None:
        assert saved_bytes(net, x) == saved
    if training is not None:
        g = torch.randn(1, tokens, width)
        assert operators(lambda: torch.autograd.backward(net(x), g))[0] == training
    if evaluation is not None:
        with torch.no_grad():
            assert operators(lambda: net.eval()(x))[0] == evaluation


@pytest.mark.parametrize("of_inputs", [False, True], ids=["outputs", "inputs"])
def test_scalings_of_two_methods_that_follow_one_another_are_one_product(of_inputs):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).requires_grad_(False)
    net = lp.inject(Net(copy.deepcopy(layer)), ia3(of_inputs))
    lp.add_adapter(net, lp.IA3(name="other", targets=ia3(of_inputs).targets,
                               feedforward_targets=ia3(of_inputs).feedforward_targets))  # fmt: skip
    lp.activate(net, "ia3", "other")
    one, two = (adapter.scales for *_, adapter in lp.adapters(net))
    with torch.no_grad():
        one.uniform_(0.5, 2)
        two.uniform_(0.5, 2)
    x = torch.randn(1, 3, 64, requires_grad=True)
    expected = layer(x * one * two) if of_inputs else layer(x) * one * two
    torch.testing.assert_close(net(x), expected)
    found = torch.autograd.grad(net(x).square().sum(), [x, one, two])
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), [x, one, two]))
    g = torch.randn(1, 3, 64)
    alone = lp.inject(Net(layer), ia3(of_inputs))
    both, one_alone = (operators(lambda net=net: torch.autograd.backward(net(x), g))[0] for net in (net, alone))
    assert both - one_alone == 4  # of vectors: a product, its two gradients, and a second parameter's


def is_quick(name, dtype, mixed):
    return mixed and dtype == torch.bfloat16 and name in ("ia3 outputs", "added bias", "bottleneck", "krona", "fedpara")


IN_16_BITS = [
    pytest.param(*entry, marks=() if is_quick(*entry) else pytest.mark.slow)
    for entry in itertools.product(FORMULAS, (torch.bfloat16, torch.float16), (False, True))
]


@pytest.mark.parametrize(("name", "dtype", "mixed"), IN_16_BITS)
def test_in_16_bits_each_form_is_close_to_that_in_32(name, dtype, mixed):
    width = 176
    net, layer, adapter, formula = case(name, width, torch.float32)
    x, g = torch.randn(1, 3, width), torch.randn(1, 3, width)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(0.5)
    fresh = {key: p.detach().clone().requires_grad_() for key, p in adapter.named_parameters()}
    expected = formula(layer, x, fresh)
    wanted = torch.autograd.grad(expected, list(fresh.values()), g)
    with torch.autocast("cpu", dtype, enabled=mixed):
        y = net(x) if mixed else net.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < 0.03 * expected.norm()
    found = torch.autograd.grad(y.float(), list(adapter.parameters()), g)
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == torch.float32
        assert (own - other).norm() < 0.05 * other.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler imports warns
@pytest.mark.parametrize("name", ["ia3 outputs", "ia3 inputs", "affine", "parallel", "krona", "fedpara"])
def test_each_form_compiles_whole_with_dynamic_sizes(name):
    width = 176
    torch._dynamo.reset()
    net, layer, adapter, formula = case(name, width)
    fast = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 800):
        x = torch.randn(1, tokens, width, dtype=torch.float64, requires_grad=True)
        expected = formula(layer, x, dict(adapter.named_parameters()))
        y = fast(x)
        torch.testing.assert_close(y, expected)
        inputs = [x, *adapter.parameters()]
        found = torch.autograd.grad(y.sin().sum(), inputs)
        torch.testing.assert_close(found, torch.autograd.grad(expected.sin().sum(), inputs), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net.eval(), fullgraph=True, backend="aot_eager", dynamic=True)(x), y)
