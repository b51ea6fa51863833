"""Autograd functions are applied without the cost of binding a signature, with the same results everywhere."""

import copy
import inspect
import sys
import threading

import pytest
import torch
from torch import func
from torch.autograd import Function

from lightning_peft.ops.autograd_function import apply_function


class Weighted(Function):
    """x^power w, without a gradient for w."""

    @staticmethod
    def forward(x, w, power):
        return x**power * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, ctx.power = inputs
        ctx.save_for_backward(x, w, output)

    @staticmethod
    def backward(ctx, g):
        x, w, _ = ctx.saved_tensors
        return g * ctx.power * x ** (ctx.power - 1) * w, None, None


def plain(x, w):
    return x**3 * w


def ours(x, w):
    return apply_function(Weighted, x, w, 3)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(4, dtype=torch.float64, requires_grad=True), torch.rand(4, dtype=torch.float64)


def test_values_and_derivatives_of_first_and_second_order_are_the_formulas(tensors):
    torch.testing.assert_close(ours(*tensors), plain(*tensors))
    assert torch.autograd.gradcheck(lambda x: ours(x, tensors[1]), tensors[:1])
    assert torch.autograd.gradgradcheck(lambda x: ours(x, tensors[1]), tensors[:1])


@pytest.mark.parametrize("transform", [func.grad, func.jacrev, lambda f: func.grad(func.grad(f))])
def test_transforms_of_functions_see_the_same_gradient(transform, tensors):
    x, w = tensors
    for wrapped in (x.detach(), x):  # inside of a transform alone, and around recorded gradients
        results = [transform(lambda x, call=call: call(x, w).sum())(wrapped[0]) for call in (ours, plain)]
        torch.testing.assert_close(*results)


def test_a_tensor_that_has_left_its_transform_is_used_as_a_plain_one(tensors):
    x, w = tensors
    left = []

    def loss(x):
        left.append(x * 1)
        return ours(x, w).sum()

    func.grad(loss)(x)
    torch.testing.assert_close(ours(left[0], w), plain(x, w))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler imports warns
def test_compiled_whole_it_has_the_same_gradient(tensors):
    torch._dynamo.reset()
    x, w = tensors
    fast = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(call(x, w).sum(), x) for call in (fast, plain))
    torch.testing.assert_close(found, wanted)


def test_no_signature_is_bound_and_nodes_keep_their_name(tensors, monkeypatch):
    ours(*tensors)
    seen = []
    monkeypatch.setattr(inspect, "signature", lambda *args, **kwargs: seen.append(args))
    assert ours(*tensors).grad_fn.name() == "WeightedBackward"
    assert seen == []


def test_few_frames_run_for_a_call(tensors):
    frames = []
    ours(*tensors)
    sys.setprofile(lambda frame, event, arg: frames.append(frame.f_code.co_name) if event == "call" else None)
    try:
        ours(*tensors)
    finally:
        sys.setprofile(None)
    assert len(frames) <= 24, frames


def test_hooks_of_saved_tensors_and_threads_work_as_for_any_function(tensors):
    x, w = tensors
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, copy.copy):
        y = ours(x, w)
    assert len(saved) == 3
    results = []
    threads = [threading.Thread(target=lambda: results.append(torch.autograd.grad(ours(x, w).sum(), x))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = torch.autograd.grad(y.sum(), x)
    for result in results:
        torch.testing.assert_close(result, wanted)
    assert len(results) == 2


def test_without_gradients_the_forward_alone_runs(tensors):
    with torch.no_grad():
        y = ours(*tensors)
    torch.testing.assert_close(y, plain(*tensors).detach())
    assert y.grad_fn is None
