"""``next_token`` where threads share a model, rows have adapters of their own, or a head is used in other ways."""

import threading
import warnings

import pytest
import torch
from adapter_edits import stir
from decoders import VOCABULARY, WIDTH, adapted, batch, decoder, difference, expected, full, gradients
from documents import blocks, execute
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.modeling_outputs import CausalLMOutput

import lightning_peft as lp
from lightning_peft.analysis.memory_plan import plan_memory

next_token = lp.losses.next_token


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
    assert difference(gradients(next_token(net, given), net), wanted[1]) < 1e-5
    assert not net.lm_head._forward_hooks
    assert not net.lm_head._forward_pre_hooks


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


@pytest.mark.parametrize("wrap", ["whole", "in place"])
def test_compiled_code_has_all_logits_since_it_sees_no_hook(wrap):
    torch.compiler.reset()
    net, given = Odd("plain"), batch()
    wanted = expected(net, given)
    if wrap == "whole":
        net = torch.compile(net, backend="eager")
    else:
        net.compile(backend="eager")
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


@pytest.mark.parametrize("targets", [["*q_proj"], ["*q_proj", "lm_head"]])
@pytest.mark.parametrize("name", ["llama", "gemma2 with a softcap"])
def test_a_plan_of_memory_counts_no_logits_that_are_not_kept(name, targets):
    net, given = adapted(name, targets), batch()
    planned = [
        plan_memory(net, lambda net, given, chunk=chunk: next_token(net, given, chunk=chunk), {8: given}).activations[8]
        for chunk in (2, 9)
    ]
    assert planned[1] - planned[0] > 9 * (VOCABULARY - 2 * WIDTH) * 4  # chunks keep hidden states and their gradients


def test_the_page_shows_a_module_that_trains():
    (text,) = blocks("docs/losses.md", "python")
    module = execute(text, "losses").Tuned()
    module.log = lambda name, value: logged.update({name: value.item()})
    logged, given = {}, batch()
    wanted = full(module.model, given).item()
    module.training_step(given, 0).backward()
    module.validation_step(given, 0)
    assert logged == {"train_loss": pytest.approx(wanted, rel=1e-5), "val_loss": pytest.approx(wanted, rel=1e-5)}
    assert module.model.lm_head.weight.grad.any()
