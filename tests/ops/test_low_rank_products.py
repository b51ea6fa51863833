"""Low-rank updates of few and of many tokens are the formulas, with the operators and saved bytes stated here."""

import copy
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from counting import OperatorCount
from torch import func, nn
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from lightning_peft.ops import low_rank_products
from lightning_peft.ops.low_rank_products import FLOAT_MASK, decomposed_linear, few_inputs, low_rank_linear

OUT, IN, RANK, SCALE = 40, 24, 3, 0.75
FEWEST = few_inputs(OUT, IN) // IN  # tokens from which the weight is updated
METHODS = {
    "lora": lp.LoRA(targets=["0"], rank=RANK, alpha=SCALE * RANK),
    "dora": lp.LoRA(targets=["0"], rank=RANK, alpha=SCALE * RANK, decompose=True),
    "adalora": lp.AdaLoRA(targets=["0"], initial_rank=RANK, target_rank=RANK, alpha=SCALE),
}


def layer(method, dtype=torch.float64, bias=True, width=IN, out=OUT):
    torch.manual_seed(0)
    net = lp.inject(nn.Sequential(nn.Linear(width, out, bias=bias)).to(dtype), method)
    ((*_, adapter),) = lp.adapters(net)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return net, adapter


def updated_weight(net, adapter):
    """W' of the formulas, by autograd alone."""
    weight, inner = net[0].weight, adapter.a
    if "e" in dict(adapter.named_parameters()):
        inner = torch.diag(adapter.e) @ adapter.a
    v = weight + adapter.scale * adapter.b @ inner
    if getattr(adapter, "magnitude", None) is None:
        return v
    return torch.diag(adapter.magnitude / v.detach().square().sum(1).sqrt()) @ v


def found_and_wanted(net, adapter, x, g):
    inputs = [x, *[p for p in net.parameters() if p.requires_grad]]
    for y in (net(x), x @ updated_weight(net, adapter).T + (0 if net[0].bias is None else net[0].bias)):
        yield y, *torch.autograd.grad(y, inputs, g)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (2, 3, 4), (FEWEST - 1,), (FEWEST,), (0,)], ids=str)
@pytest.mark.parametrize(("method", "tiny"), [*[(method, 2**14) for method in METHODS], ("dora", 0)])
def test_few_and_many_tokens_have_the_values_and_gradients_of_the_formula(method, tiny, shape, bias, monkeypatch):
    monkeypatch.setattr(low_rank_products, "TINY_WEIGHT", tiny)
    net, adapter = layer(METHODS[method], bias=bias)
    x = torch.randn(*shape, IN, dtype=torch.float64, requires_grad=True)
    found, wanted = found_and_wanted(net, adapter, x, torch.randn(*shape, OUT, dtype=torch.float64))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_may_be_vectors_transposed_expanded_or_frozen_and_the_base_trained(method):
    net, adapter = layer(METHODS[method])
    row = torch.randn(IN, dtype=torch.float64, requires_grad=True)
    for x in (row, row.expand(5, IN), torch.randn(IN, 4, 5, dtype=torch.float64, requires_grad=True).transpose(0, 2)):
        found, wanted = found_and_wanted(net, adapter, x, torch.ones(*x.shape[:-1], OUT, dtype=torch.float64))
        torch.testing.assert_close(found, wanted)
    net[0].weight.requires_grad_()
    found, wanted = found_and_wanted(net, adapter, x, torch.ones(*x.shape[:-1], OUT, dtype=torch.float64))
    torch.testing.assert_close(found, wanted)
    adapter.a.requires_grad_(False)
    found, wanted = found_and_wanted(net, adapter, x, torch.ones(*x.shape[:-1], OUT, dtype=torch.float64))
    torch.testing.assert_close(found, wanted)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("tiny", "chunk"), [(0, 1), (0, 2**17), (2**14, 1)], ids=["apart", "together", "built"])
def test_the_derivatives_of_a_decomposed_layer_are_exact_with_rows_of_zeros(tiny, chunk, monkeypatch):
    monkeypatch.setattr(low_rank_products, "TINY_WEIGHT", tiny)
    monkeypatch.setattr(low_rank_products, "_CHUNK", chunk)
    torch.manual_seed(0)
    weight, (x, bias, a, b, m) = random(5, 4).detach(), [random(*s) for s in ((2, 3, 4), (5,), (2, 4), (5, 2), (5,))]
    with torch.no_grad():
        weight[1], b[1], m[1], m[2] = 0, 0, 0, 0
    norm = (weight + 0.5 * b @ a).detach().square().sum(1).sqrt()  # constant in gradients

    def ours(x, bias, a, b, m):
        return decomposed_linear(x, weight, bias, a, b, m, 0.5)

    def formula(x, bias, a, b, m):
        c = m / torch.where(norm == 0, 1, norm)
        return x @ ((weight + 0.5 * b @ a) * c[:, None]).T + bias

    inputs, g = (x, bias, a, b, m), random(2, 3, 5).detach()
    torch.testing.assert_close(ours(*inputs), formula(*inputs))
    found, wanted = (torch.autograd.grad(call(*inputs), inputs, g) for call in (ours, formula))
    torch.testing.assert_close(found, wanted)
    assert (found[4][2] != 0).item()  # a length of zero can grow
    # With A and B held, nothing counts as constant, so that numbers can be compared with differences.
    assert torch.autograd.gradcheck(lambda x, bias, m: ours(x, bias, a.detach(), b.detach(), m), (x, bias, m))


@pytest.mark.parametrize("decompose", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("tokens", [7, FLOAT_MASK // IN + 1], ids=["float mask", "packed mask"])
def test_dropout_takes_inputs_from_the_update_alone(tokens, decompose):
    method = lp.LoRA(targets=["0"], rank=RANK, alpha=SCALE * RANK, dropout=0.25, decompose=decompose)
    net, adapter = layer(method)
    x = random(tokens, IN)
    torch.manual_seed(1)
    y = net(x)
    torch.manual_seed(1)
    again = net(x)
    torch.testing.assert_close(again, y, rtol=0, atol=0)
    # What was kept is read from an update that hands on its inputs.
    torch.manual_seed(1)
    if decompose or tokens * IN < FLOAT_MASK:
        kept = F.dropout(torch.ones_like(x), 0.25).detach()
    else:
        eye = torch.eye(IN, dtype=torch.float64)
        kept = low_rank_products.dropped_low_rank(torch.ones_like(x), eye, eye, 1.0, 0.25).detach()
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    change = updated_weight(net, adapter) - net[0].weight
    expected = x @ net[0].weight.T + net[0].bias + (x * kept) @ change.T
    torch.testing.assert_close(y, expected)
    inputs, g = [x, *[p for p in net.parameters() if p.requires_grad]], torch.randn_like(y)
    torch.testing.assert_close(*[torch.autograd.grad(t, inputs, g) for t in (y, expected)])


def test_dropout_inside_of_a_checkpoint_draws_the_same_mask_again():
    net, _ = layer(lp.LoRA(targets=["0"], rank=RANK, dropout=0.5))
    x = random(6, IN)
    inputs, results = [x, *[p for p in net.parameters() if p.requires_grad]], []
    for call in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        torch.manual_seed(2)
        results.append(torch.autograd.grad(call(x).square().sum(), inputs))
    torch.testing.assert_close(*results)


def count(net, x):
    with OperatorCount() as seen:
        y = net(x)
        forward = seen.operators.total()
        torch.autograd.grad(y, [x, *[p for p in net.parameters() if p.requires_grad]], torch.ones_like(y))
    return forward, seen.operators.total()


def saved_numbers(net, x):
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() / 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = net(x)
    del y
    return sum(size for key, size in sizes.items() if key not in own)


DROPOUT = lp.LoRA(targets=["0"], rank=RANK, dropout=0.1)
DROPPED_DORA = lp.LoRA(targets=["0"], rank=RANK, dropout=0.1, decompose=True)
T, MANY = 10, FEWEST
FORMS = {  # operators of forward, of forward and backward; numbers that are saved besides parameters
    "lora, few": (METHODS["lora"], T, 7, 26, T * (IN + RANK)),
    "lora, many": (METHODS["lora"], MANY, 3, 17, MANY * IN),
    "dropout, few": (DROPOUT, T, 11, 31, T * (2 * IN + RANK)),
    "dora, few": (METHODS["dora"], T, 14, 40, T * (IN + RANK + OUT) + 2 * OUT),
    "dora, tiny": (METHODS["dora"], T, 8, 28, T * (IN + OUT) + OUT * IN + 2 * OUT),
    "dora with dropout, few": (DROPPED_DORA, T, 21, 53, T * (2 * IN + RANK + OUT) + 2 * OUT),
    "adalora, few": (METHODS["adalora"], T, 9, 32, T * (IN + RANK) + RANK * IN),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_has_a_number_of_operators_and_saves_a_number_of_numbers(name, monkeypatch):
    monkeypatch.setattr(low_rank_products, "TINY_WEIGHT", IN * OUT if "tiny" in name else 0)
    method, tokens, forward, both, saved = FORMS[name]
    net, _ = layer(method, torch.float32)
    x = torch.randn(tokens, IN, requires_grad=True)
    assert (*count(net, x), saved_numbers(net, x)) == (forward, both, saved)


def test_a_call_with_few_tokens_runs_few_frames_of_python():
    net, _ = layer(METHODS["lora"], torch.float32)
    x, frames = torch.randn(4, IN), []
    net(x)
    host = net[0]
    sys.setprofile(lambda frame, event, arg: frames.append(frame.f_code.co_name) if event == "call" else None)
    try:
        host(x)
    finally:
        sys.setprofile(None)
    assert len(frames) <= 28, frames


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_transforms_of_functions_give_the_gradient_of_each_example(method):
    net, adapter = layer(METHODS[method])
    x = random(3, 2, IN).detach()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(a, x):
        changed = parameters | {"0.peft.lora.a": a}
        return func.functional_call(net, changed, x).square().sum()

    found = func.vmap(func.grad(loss), in_dims=(None, 0))(adapter.a.detach(), x)
    for gradient, example in zip(found, x, strict=True):
        wanted = (example @ updated_weight(net, adapter).T + net[0].bias).square().sum()
        torch.testing.assert_close(gradient, torch.autograd.grad(wanted, adapter.a)[0])


@pytest.mark.parametrize("decompose", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["stored", "autocast"])
def test_few_tokens_in_16_bits_are_within_their_rounding(decompose, kind):
    method = METHODS["dora" if decompose else "lora"]
    wide, adapter = layer(method, torch.float32)
    x, g = torch.randn(5, IN), torch.randn(5, OUT)
    net, dtype = copy.deepcopy(wide), torch.float32
    if kind == "stored":
        net, dtype = net.bfloat16(), torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        y = net(x.to(dtype))
    assert y.dtype == torch.bfloat16
    expected = wide(x)
    torch.testing.assert_close(y.float(), expected, atol=0.03 * expected.abs().max().item(), rtol=0.02)
    trained = [[p for p in each.parameters() if p.requires_grad] for each in (net, wide)]
    found, wanted = torch.autograd.grad(y, trained[0], g.bfloat16()), torch.autograd.grad(expected, trained[1], g)
    for gradient, right in zip(found, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - right).norm() <= 0.05 * right.norm()


def test_a_length_in_float32_changes_a_layer_in_16_bits_which_would_round_it():
    net, adapter = layer(METHODS["dora"], torch.float32)
    x = torch.randn(400, IN)
    net.bfloat16()
    nn.init.zeros_(adapter.b)
    outputs = []
    for factor in (1, 1.003):  # which 16 bits would round to 1
        with torch.no_grad():
            adapter.magnitude.copy_(factor * net[0].weight.float().norm(dim=1))
            net[0].bias.zero_()
        outputs.append(net(x.bfloat16()).float().detach())
    assert (outputs[1] / outputs[0]).nanmean().item() == pytest.approx(1.003, abs=5e-4)


def test_threads_may_train_and_decode_one_layer_at_once():
    net, adapter = layer(METHODS["dora"])
    x, results = random(4, IN).detach(), {}
    expected = net(x).detach()

    def run(name, grad):
        for _ in range(20):
            with torch.set_grad_enabled(grad):
                results.setdefault(name, []).append(net(x).detach())

    threads = [threading.Thread(target=run, args=(name, name % 2 == 0)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for each in results.values():
        for y in each:
            torch.testing.assert_close(y, expected)


def test_the_rules_are_in_numbers_of_the_input_and_hold_at_the_sizes_they_were_measured_at():
    assert [few_inputs(width, width) // width for width in (64, 512, 2048)] == [1024, 512, 2048]
    weight, a, b = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    x = torch.randn(3, 6)
    torch.testing.assert_close(low_rank_linear(x, weight, None, a, b, 2.0), x @ (weight + 2 * b @ a).T)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler imports warns
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("decompose", [False, True], ids=["lora", "dora"])
def test_training_compiles_whole_over_sizes_on_both_sides_of_the_rules(decompose, dropout):
    torch._dynamo.reset()
    net, adapter = layer(lp.LoRA(targets=["0"], rank=RANK, decompose=decompose, dropout=dropout))
    fast = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = [p for p in net.parameters() if p.requires_grad]
    for tokens in (3, FEWEST + 5, 4, FLOAT_MASK // IN + 1, 60):
        x = random(tokens, IN)
        results = []
        for call in (fast, net):
            torch.manual_seed(3)
            y = call(x)
            results.append((y, *torch.autograd.grad(y.sum(), [x, *inputs])))
        if not dropout or tokens * IN < FLOAT_MASK:  # compiled code draws a packed mask from other numbers
            torch.testing.assert_close(*results)
        else:
            norms = [(y - x @ net[0].weight.T - net[0].bias).norm().item() for y, *_ in results]
            assert norms[0] == pytest.approx(norms[1], rel=0.05)
