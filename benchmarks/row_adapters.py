"""Sixteen rows with eight LoRA adapters in one batch, beside one adapter for all rows and beside peft's mixed batches.

    python benchmarks/row_adapters.py --small

Evaluation without gradients. ``mixed/one`` is against one active adapter, whose updated weights are kept between calls
on the CPU; ``mixed/added`` against one that all rows name. Each call enters its context anew, as one of a server does.
"""

from argparse import Namespace
from collections.abc import Iterator

import harness
import peft
import torch
from rows import Row, main, timed
from torch import nn

import lightning_peft as lp

ROWS, ADAPTERS, RANK = 16, 8, 8
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
TOKENS = {"prompts": 64, "one token": 1}
GOALS = {"mixed/one": 1.3, "mixed/peft": 1.0, "mixed/added": None}


def ours(kind: str, small: bool, count: int) -> nn.Module:
    model = harness.MODELS[kind](small)[0].eval()
    for number in range(count):
        lp.add_adapter(model, lp.LoRA(rank=RANK, alpha=RANK, targets=TARGETS[kind]), f"a{number}")
    stir(model)
    return model


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
    names = [f"a{row % ADAPTERS}" for row in range(ROWS)]
    for kind in options.models:
        one, mixed, peer = (
            ours(kind, options.small, 1),
            ours(kind, options.small, ADAPTERS),
            theirs(kind, options.small),
        )
        lp.activate(one, "a0")
        for what, tokens in TOKENS.items():
            ids = torch.randint(0, one.config.vocab_size, (ROWS, tokens))

            def call_added(ids=ids, one=one) -> None:
                with lp.row_adapters(one, ["a0"] * ROWS), torch.no_grad():
                    one(input_ids=ids)

            def call_one(ids=ids, one=one) -> None:
                with torch.no_grad():
                    one(input_ids=ids)

            def call_mixed(ids=ids, mixed=mixed) -> None:
                with lp.row_adapters(mixed, names), torch.no_grad():
                    mixed(input_ids=ids)

            def call_peft(ids=ids, peer=peer) -> None:
                with torch.no_grad():
                    peer(input_ids=ids, adapter_names=names)

            calls = {"one": call_one, "added": call_added, "mixed": call_mixed, "peft": call_peft}
            yield what, kind, "lora", timed(GOALS, options, calls)


if __name__ == "__main__":
    main("row_adapters", __doc__, {"models": list(harness.MODELS)}, run)
