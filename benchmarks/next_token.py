"""python benchmarks/next_token.py: a training step by the loss of the next token; writes results/next_token.json.

    python benchmarks/next_token.py --small

Sides take turns in one process, on one Llama (4 layers of 256) with LoRA on query and value, whose head is frozen, has
LoRA or trains. ``all logits`` is transformers' ``model(**batch).loss``; ``labelled logits`` selects of all logits;
``torch, own chunks`` and ``torch, our chunks`` are ``linear_cross_entropy`` on labelled places, with chunks that torch
or ``next_token`` chooses; ``autograd in chunks`` is ``next_token`` without it. CPU seconds are medians, ratios medians
of the ratios of each round. Peaks are those of tensors in forward and backward, from the allocator's own events.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear_cross_entropy
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from lightning_peft.losses.chunks import cross_entropy_sum, token_losses, token_values
from lightning_peft.losses.head_inputs import HeadInputs, head_inputs
from lightning_peft.losses.next_token_loss import aligned
from lightning_peft.losses.places import Places

Batch = dict[str, Tensor]
SHAPES = {"30,522 words": (30522, 8, 165, 340), "128,256 words": (128256, 4, 121, 124)}  # rows, tokens, labelled
HEADS = ("frozen", "LoRA", "trained")
MEGABYTE = 2**20


def llama(vocabulary: int, head: str, small: bool) -> nn.Module:
    width, layers = (32, 1) if small else (256, 4)
    sizes = {"hidden_size": width, "intermediate_size": width * 43 // 16, "num_hidden_layers": layers}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=8, tie_word_embeddings=False, **sizes)
    targets = ["attention.query", "attention.value", *(["lm_head"] if head == "LoRA" else [])]
    also = ["lm_head"] if head == "trained" else []
    return lp.inject(LlamaForCausalLM(config), lp.LoRA(rank=8, alpha=16, targets=targets), also_train=also).train()


def batch_of(vocabulary: int, rows: int, tokens: int, labelled: int) -> Batch:
    """Rows whose last tokens are labelled, as answers after prompts are."""
    ids = torch.randint(1, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    counts = torch.full((rows, 1), labelled // rows) + (torch.arange(rows)[:, None] < labelled % rows)
    labels = ids.masked_fill(torch.arange(tokens) < tokens - counts, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def selected(net: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = aligned(net, batch)
    known = targets != -100
    return cross_entropy(net(**inputs).logits[known].float(), targets[known])


def at_labels(net: nn.Module, batch: Batch, loss: Callable[[HeadInputs, Tensor], Tensor]) -> Tensor:
    inputs, targets = aligned(net, batch)
    places = Places.of(targets != -100)
    return loss(head_inputs(net, inputs, places, chunk=1), places.take(targets)) / len(places)


def torch_chunks(found: HeadInputs, tokens: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return linear_cross_entropy(found.rows, found.head.weight, tokens, reduction="sum", options=options)


def in_chunks(found: HeadInputs, tokens: Tensor) -> Tensor:
    return token_values(token_losses, found, tokens).sum()


def sides(head: str) -> dict[str, Callable[[nn.Module, Batch], Tensor]]:
    found = {"all logits": harness.loss, "labelled logits": selected, "next_token": lp.losses.next_token}
    if head == "LoRA":  # which a product with the weight alone would leave out
        return found
    calls = {"torch, own chunks": torch_chunks, "torch, our chunks": cross_entropy_sum, "autograd in chunks": in_chunks}
    return found | {name: partial(at_labels, loss=loss) for name, loss in calls.items()}


def step(net: nn.Module, batch: Batch, loss: Callable[[nn.Module, Batch], Tensor]) -> float:
    net.zero_grad()
    value = loss(net, batch)
    value.backward()
    return value.item()


def cpu_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        gc.collect()
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            begin = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - begin)
    return times


def peak(call: Callable[[], Any]) -> int:
    """Return the bytes of tensors at their peak, above those from before the call."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def measure(shape: tuple[int, ...], head: str, options: argparse.Namespace) -> dict[str, Any]:
    net, batch = llama(shape[0], head, options.small), batch_of(*shape)
    calls = {name: partial(step, net, batch, loss) for name, loss in sides(head).items()}
    values = {name: call() for name, call in calls.items()}  # the first round is a warm-up, too
    assert max(values.values()) - min(values.values()) < 1e-4 * values["all logits"], values
    times = cpu_seconds(calls, options.rounds)
    found = {}
    for name, call in calls.items():
        net.zero_grad()
        seconds, megabytes = statistics.median(times[name]), peak(call) / MEGABYTE
        ratio = harness.ratio(times, name, "all logits")
        found[name] = {"cpu_s": round(seconds, 4), "ratio": round(ratio, 3), "peak_mb": round(megabytes, 1)}
        print(f"{name:20} {seconds:8.4f} s  {ratio:5.2f}  {megabytes:8.1f} MB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="shows that it runs; writes nothing")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--heads", nargs="*", default=HEADS, choices=HEADS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape in ({"1,000 words": (1000, 2, 16, 9)} if options.small else SHAPES).items():
        for head in options.heads:
            print(f"{name}, {shape[1]} x {shape[2]} tokens, {shape[3]} labelled, head: {head}", flush=True)
            found = measure(shape, head, options)
            if not options.small:
                harness.write({name: {head: found}}, "next_token")


if __name__ == "__main__":
    main()
