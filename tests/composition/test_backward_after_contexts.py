"""What gradient checkpointing computes again in backward has the adapters of its forward, wherever that is."""

import threading

import pytest
import torch
from adapter_edits import stir
from models import MODELS, logits, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp

BOTH = pytest.mark.parametrize("reentrant", [False, True])
INPUTS = {"input_ids": tokens(4)}


def model(checkpointing, reentrant):
    torch.manual_seed(0)
    net = MODELS["llama"]()
    lp.add_adapter(net, lp.LoRA(rank=2), "a")
    lp.add_adapter(net, lp.LoRA(rank=4, alpha=3), "b", also_train=["lm_head", "norms"])
    stir(net, 0)
    lp.activate(net, "a", "b")
    net.train()
    if checkpointing:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        net.enable_input_require_grads()
    return net


def gradients(net):
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@BOTH
def test_rows_keep_their_adapters_in_backward(reentrant):
    results = []
    for checkpointing in (False, True):
        net = model(checkpointing, reentrant)
        with lp.row_adapters(net, ["a", "b", None, "a"]):
            inside = logits(net(**INPUTS)).square().sum()
        outside = logits(net(**INPUTS)).square().sum()
        with lp.row_adapters(net, ["b", "b", "b", None]):
            (inside + 2 * outside).backward()
        results.append(gradients(net))
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-4, rtol=1e-3)
        assert gradient.any(), name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@BOTH
def test_backward_in_another_thread_has_what_was_active_in_forward(reentrant):
    """As that of CUDA, whose backward runs in threads of its own."""
    results = []
    for checkpointing in (False, True):
        net, found = model(checkpointing, reentrant), []

        def step(net=net, found=found):
            lp.activate(net, "b")
            found.append(logits(net(**INPUTS)).square().sum())

        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        found[0].backward()
        results.append(gradients(net))
    assert results[0]
    assert not any(".peft.a." in name for name in results[0])
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-5, rtol=1e-4)


@BOTH
def test_a_part_that_was_disabled_is_disabled_when_it_is_computed_again(reentrant):
    torch.manual_seed(0)
    x, results = torch.randn(3, 4, requires_grad=True), []
    net = lp.inject(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), lp.LoRA(rank=2, targets=["0", "2"]))
    stir(net, 1)
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        with lp.disabled(net):
            teacher = run(net, x)
        loss = (teacher - run(net, x)).square().sum()
        with lp.disabled(net):
            loss.backward()
        results.append({**gradients(net), "x": x.grad.clone()})
        x.grad = None
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)
    assert len(results[0]) == 5
