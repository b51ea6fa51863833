"""``next_token`` on models that are compiled, wrapped, sharded, shared by threads, or use their head in other ways."""

import functools
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from adapter_edits import stir
from decoders import VOCABULARY, WIDTH, batch, decoder, difference, full, gradients
from processes import together
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers.modeling_outputs import CausalLMOutput

import lightning_peft as lp

next_token = lp.losses.next_token


def adapted(name="llama", targets=("*q_proj", "lm_head")):
    net = lp.inject(decoder(name), lp.LoRA(rank=2, targets=list(targets)))
    stir(net, 1)
    return net


def expected(net, given):
    loss = full(net, given)
    return loss.item(), gradients(loss, net)


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


def test_rows_with_adapters_of_their_own_on_the_head():
    net, given = decoder("llama"), batch()
    for number, name in enumerate("ab"):
        lp.add_adapter(net, lp.LoRA(rank=2 + number, targets=["*q_proj", "lm_head"]), name)
    stir(net, 1)
    with torch.no_grad():
        with lp.row_adapters(net, ["a", "b", None]):
            found = next_token(net, given, reduction="none", chunk=1)
        for row, name in enumerate("ab"):
            lp.activate(net, name)
            alone = next_token(net, {k: v[row : row + 1] for k, v in given.items()}, reduction="none")
            torch.testing.assert_close(found[row : row + 1], alone)
        lp.activate(net, "a")
        last = next_token(net, given, reduction="none")[2]
    assert (found[2] - last).abs().max() > 1e-2


def test_two_threads_at_once():
    net, results = adapted(), {}
    batches = [batch(), batch(left=True)]
    wanted = [expected(net, each) for each in batches]
    barrier, errors = threading.Barrier(2), []

    def run(number):
        try:
            for _ in range(5):
                barrier.wait(20)
                results[number] = gradients(next_token(net, batches[number], chunk=1), net)
        except Exception as error:  # of a thread, which would be lost
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    assert errors == []
    assert max(difference(results[number], wanted[number][1]) for number in range(2)) < 1e-5


def test_a_failure_leaves_no_hook():
    net, given = adapted(), batch()
    wanted = expected(net, given)
    for call in ({"input_ids": given["input_ids"] + VOCABULARY}, {"position_ids": "none"}):
        with pytest.raises((IndexError, AttributeError, TypeError, RuntimeError)):
            next_token(net, given | call)
    same(net, given, wanted)


class Odd(nn.Module):
    """A model of transformers, by its methods, whose head is used as ``kind`` says."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.base_model, self.config = kind, nn.Embedding(VOCABULARY, WIDTH), None
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def get_input_embeddings(self):
        return self.base_model

    def get_output_embeddings(self):
        return None if self.kind == "unknown" else self.head

    def forward(self, input_ids, attention_mask, use_cache=None):
        hidden = self.base_model(input_ids).cumsum(1)
        if self.kind == "twice":
            logits = self.head(hidden) + self.head(2 * hidden)
        elif self.kind == "read":
            logits = nn.functional.linear(hidden, self.head.weight, self.head.bias)
        elif self.kind == "counts":
            logits = self.head(hidden) + input_ids[..., None]
        elif self.kind == "flat":
            logits = self.head(hidden.flatten(0, 1)).view(*input_ids.shape, -1)
        elif self.kind == "in place":
            logits = self.head(hidden)
            logits.mul_(0.5)
            logits[..., 0] = -3.0
            left, right = logits.float().split(VOCABULARY // 2, -1)
            logits = torch.cat([right, left, left[..., :1].tanh()], -1)
        else:
            logits = self.head(hidden)
        return CausalLMOutput(logits=logits)


@pytest.mark.parametrize("kind", ["plain", "in place", "twice", "counts", "read", "flat", "unknown"])
def test_a_head_that_is_used_in_another_way(kind):
    net, given = Odd(kind), batch()
    wanted = expected(net, given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loss = next_token(net, given, chunk=2)
            assert loss.item() == pytest.approx(wanted[0], abs=1e-5)
            assert difference(gradients(loss, net), wanted[1]) < 1e-5
    messages = [str(each.message) for each in caught]
    assert len(messages) == (kind in ("twice", "counts"))
    assert all("Odd does not answer for some places alone" in message for message in messages)


@pytest.mark.parametrize("wrap", [compiled_whole, compiled_in_place])
def test_compiled_code_has_all_logits_since_it_sees_no_hook(wrap):
    torch.compiler.reset()
    net, given = Odd("plain"), batch()
    wanted = expected(net, given)
    net = wrap(net)
    for _ in range(2):
        loss = next_token(net, given, chunk=2)
        assert loss.item() == pytest.approx(wanted[0], abs=1e-5)
        found = {name.removeprefix("_orig_mod."): g for name, g in gradients(loss, net).items()}
        assert difference(found, wanted[1]) < 1e-5


def largest(call):
    """Bytes of the largest tensor that a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return max(event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["*q_proj"]), ("llama", ["*q_proj", "lm_head"]), ("gemma2 with a softcap", ["*q_proj"])],
)
def test_no_tensor_is_larger_than_a_chunk_of_logits(name, targets):
    net = lp.inject(decoder(name, vocab_size=4000), lp.LoRA(rank=2, targets=targets))
    ids = torch.randint(0, 4000, (12, 16))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    next_token(net, given)  # buffers that are made once
    assert largest(lambda: next_token(net, given, chunk=20).backward()) == 20 * 4000 * 4
    with torch.no_grad():
        assert largest(lambda: next_token(net, given, chunk=20, reduction="none")) == 20 * 4000 * 4
    assert largest(lambda: full(net, given).backward()) == 12 * 16 * 4000 * 4


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
