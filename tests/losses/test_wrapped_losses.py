"""``next_token`` on models that are compiled, sharded or wrapped."""

import functools

import pytest
import torch
import torch.distributed as dist
from decoders import adapted, batch, difference, expected, gradients
from processes import together
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lightning_peft as lp

next_token = lp.losses.next_token


def same(net, given, wanted, call=next_token):
    loss = call(net, given)
    assert loss.item() == pytest.approx(wanted[0], abs=1e-5)
    assert difference(gradients(loss, net), wanted[1]) < 1e-5
    head = getattr(net, "_orig_mod", net).lm_head
    assert not head._forward_hooks
    assert not head._forward_pre_hooks


def compiled_whole(net):
    return torch.compile(net, backend="eager")


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


def compiled_backbone(net):
    net.model.compile(backend="eager")
    return net


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2 with a softcap"])
@pytest.mark.parametrize("wrap", [compiled_whole, compiled_in_place, compiled_backbone])
def test_compiled_models(name, wrap):
    torch.compiler.reset()
    net, given = adapted(name), batch()
    wanted = expected(net, given)
    net = wrap(net)
    with torch.no_grad():  # what was compiled before has no hooks
        net(**{k: v for k, v in given.items() if k != "labels"})
    prefix = "_orig_mod." if wrap is compiled_whole else ""
    for _ in range(2):
        same(net, given, (wanted[0], {f"{prefix}{parameter}": g for parameter, g in wanted[1].items()}))


@pytest.mark.slow
def test_a_compiled_step():
    torch.compiler.reset()
    net, given = adapted(), batch()
    wanted = expected(net, given)
    for reduction in ("mean", "none"):
        step = torch.compile(functools.partial(next_token, reduction=reduction), backend="eager", fullgraph=True)
        same(net, given, wanted, lambda *args, step=step: step(*args).sum() / (9 if step(*args).dim() else 1))
    same(net, given, wanted)


def sharded(kind):
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    net, given = adapted(), batch()
    wanted = expected(net, given)
    if kind == "ddp":
        wrapped = DistributedDataParallel(net, find_unused_parameters=True)
        loss = next_token(wrapped, given, chunk=2)
        loss.backward()
        return loss.item() - wanted[0], difference(
            {n: p.grad for n, p in net.named_parameters() if p.requires_grad}, wanted[1]
        )
    for part in [*net.model.layers, *([net.lm_head] if kind == "head apart" else [])]:
        fully_shard(part)
    fully_shard(net)
    for _ in range(2):
        net.zero_grad()
        loss = next_token(net, given, chunk=2)
        loss.backward()
    found = {n: p.grad.full_tensor() for n, p in net.named_parameters() if p.requires_grad}
    return loss.item() - wanted[0], difference(found, wanted[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "whole", "head apart"])
def test_sharded_and_wrapped_models(kind):
    for loss, gradient in together(sharded, kind):
        assert abs(loss) < 1e-5
        assert gradient < 1e-5
