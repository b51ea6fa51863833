"""Sixteen rows with eight adapters in one batch, beside one adapter for all rows and beside peft's mixed batches.

    python benchmarks/row_adapters.py --small

Evaluation without gradients, and forward with backward, for which peft has no mixed batches. ``mixed/one`` is against
one active adapter, whose updated weights are kept between calls of evaluation on the CPU; ``mixed/added`` against one
that all rows name. Each call enters its context anew, as one of a server does.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import harness
import peft
import torch
from rows import Row, main, timed
from torch import Tensor, nn

import lightning_peft as lp

ROWS, ADAPTERS, RANK = 16, 8, 8
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
NAMES = [f"a{row % ADAPTERS}" for row in range(ROWS)]
TOKENS = {"prompts": 64, "one token": 1}
GOALS = {"mixed/one": 1.3, "mixed/added": None}
METHODS = {
    "lora": lambda kind: lp.LoRA(rank=RANK, alpha=RANK, targets=TARGETS[kind]),
    "ia3": lambda kind: lp.IA3(),
    "bottleneck": lambda kind: lp.Bottleneck(size=RANK, train_norms=False, train_head=False),
}


def ours(kind: str, method: str, small: bool, count: int) -> nn.Module:
    model = harness.MODELS[kind](small)[0].eval()
    for number in range(count):
        lp.add_adapter(model, METHODS[method](kind), f"a{number}")
    stir(model)
    return lp.activate(model, *[f"a{number}" for number in range(count)])


def theirs(kind: str, small: bool) -> nn.Module:
    model = harness.MODELS[kind](small)[0].eval()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS[kind])
    wrapped = peft.get_peft_model(model, config, adapter_name="a0")
    for number in range(1, ADAPTERS):
        wrapped.add_adapter(f"a{number}", config)
    stir(wrapped)
    return wrapped.eval()


def stir(model: nn.Module) -> None:
    """Fill what starts at zero."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def run(options: Namespace) -> Iterator[Row]:
    for kind in options.models:
        for method in options.methods:
            one, mixed = (ours(kind, method, options.small, count) for count in (1, ADAPTERS))
            for what, tokens in TOKENS.items():
                ids = torch.randint(0, one.config.vocab_size, (ROWS, tokens))
                calls, goals = calls_of(one, mixed, ids, False), GOALS
                if method == "lora":
                    calls["peft"], goals = peft_call(theirs(kind, options.small), ids), GOALS | {"mixed/peft": 1.0}
                yield what, kind, method, timed(goals, options, calls)
            ids = torch.randint(0, one.config.vocab_size, (ROWS, TOKENS["prompts"]))
            yield "training", kind, method, timed(GOALS, options, calls_of(one, mixed, ids, True))


def calls_of(one: nn.Module, mixed: nn.Module, ids: Tensor, training: bool) -> dict[str, Callable[[], None]]:
    def call(model: nn.Module, names: list[str] | None) -> None:
        with lp.row_adapters(model, names) if names else nullcontext(), torch.set_grad_enabled(training):
            logits = model(input_ids=ids).logits
            if training:
                logits.square().mean().backward()

    return {
        "one": partial(call, one, None),
        "added": partial(call, one, ["a0"] * ROWS),
        "mixed": partial(call, mixed, NAMES),
    }


def peft_call(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            model(input_ids=ids, adapter_names=NAMES)

    return call


if __name__ == "__main__":
    main("row_adapters", __doc__, {"models": list(harness.MODELS), "methods": list(METHODS)}, run)
