"""python benchmarks/decoding.py: tokens a second of a small Llama with a cache of keys and values.

First one row, with the frozen base, with live adapters and with merged ones; then 64 rows that use 1, 8 and 64 adapters
in one batch. This package, HF peft and a hand-written form take turns in one process; a turn reads the prompt and
generates greedily; CPU time counts. Writes results/decoding.json. With --small the sizes are tiny, the numbers mean
nothing, and nothing is written.
"""

import gc
import itertools
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import harness
import peft
import rows
import torch
from hand_written_prompts import CACHE
from layer_sides import DECODE
from llama_sides import CASES, MERGEABLE, model_sides, small_llama
from many_adapters import BY_ROW, ROWS, many_adapters
from rows import Row, found
from sides import known, wrapped
from torch import Tensor, nn

import lightning_peft as lp

PROMPT, STEPS = 16, 32
SIZES = {"2 x 64": (2, 64), "6 x 64": (6, 64), "16 x 64": (16, 64), "4 x 512": (4, 512)}  # blocks x width
COUNTS = ["1", "8", "64"]  # of adapters in a batch
SIDES = ("base", "ours", "peft", "hand", "merged", "peft_merged")
GOALS = {"ours/base": None, "ours/hand": None, "merged/base": 1.02, "peft_merged/base": None}


def generate(model: nn.Module, ids: Tensor, steps: int, **kwargs: Any) -> None:
    """Continue rows greedily: the prompt first, then one token at a time over the cache that it left."""
    output = model(input_ids=ids, use_cache=True, **kwargs)
    following = after_prompt(model)
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(-1)
        output = following(input_ids=token, use_cache=True, **{CACHE: output[CACHE]}, **kwargs)


def after_prompt(model: nn.Module) -> nn.Module:
    """Return what continues a cache that holds virtual tokens: the base, with peft and by hand."""
    if isinstance(model, peft.PeftModel) and model.active_peft_config.is_prompt_learning:
        return model.get_base_model()
    return model.model if type(model).__module__ == "hand_written_prompts" else model


def one_row(name: str, size: str, options: Namespace) -> dict[str, Any]:
    build = partial(small_llama, *SIZES[size])
    sides = {"base": build().requires_grad_(False), **model_sides(name, build)}
    sides.pop("adapters", None)
    if name in MERGEABLE:
        sides["merged"] = lp.merge(model_sides(name, build)["ours"])
        if CASES[name].peer is not None:
            model = build()
            sides["peft_merged"] = wrapped(model, CASES[name].peer(model.config)).merge_and_unload()
    ids = torch.randint(0, 256, (1, PROMPT))
    calls = {who: partial(generate, side.eval(), ids, steps(options)) for who, side in sides.items()}
    return timed({"ours/peft": DECODE.get(name, 1.0)} | GOALS, options, calls, 1)


def by_row(name: str, size: str, count: int, options: Namespace) -> dict[str, Any]:
    """Measure a batch whose rows take turns with as many adapters."""
    build = partial(small_llama, *SIZES[size])
    models = {"base": build().requires_grad_(False), **many_adapters(name, count, build)}
    if not name.startswith("lora"):
        models.pop("peft", None)
    names, ids = [f"a{row % count}" for row in range(ROWS)], torch.randint(0, 256, (ROWS, PROMPT))
    calls = {who: partial(in_context, who, model.eval(), ids, names, steps(options)) for who, model in models.items()}
    return timed({"ours/base": None, "ours/peft": 1.0}, options, calls, ROWS)


def in_context(who: str, model: nn.Module, ids: Tensor, names: list[str], steps: int) -> None:
    """Generate for rows that name their adapters."""
    with lp.row_adapters(model, names) if who == "ours" else nullcontext():
        generate(model, ids, steps, **({"adapter_names": names} if who == "peft" else {}))


def steps(options: Namespace) -> int:
    return 2 if options.small else STEPS


def timed(goals: rows.Goals, options: Namespace, calls: dict[str, Callable[[], None]], count: int) -> dict[str, Any]:
    calls = {who: torch.no_grad()(call) for who, call in calls.items()}
    times = harness.paired(calls, options.rounds, options.budget, clock=time.thread_time)
    goals = known(goals, calls)
    tokens = {who: round(count * steps(options) / statistics.median(of_turns), 1) for who, of_turns in times.items()}
    return found({pair: harness.ratio(times, *pair.split("/")) for pair in goals}, goals, tokens_a_second=tokens)


def run(options: Namespace) -> Iterator[Row]:
    gc.freeze()  # else each round looks for garbage among all that was imported
    sizes = options.sizes[:1] if options.small else options.sizes
    for size in sizes:
        for name in options.methods if "one row" in options.only else ():
            yield "one row", size, name, one_row(name, size, options)
        by_rows = [name for name in BY_ROW if name in options.methods and "by row" in options.only]
        for name, count in itertools.product(by_rows, options.counts[: 2 if options.small else None]):
            yield "by row", f"{size}, {count} adapters", name, by_row(name, size, int(count), options)


def lines(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a line of the table for each measurement."""
    for part, kinds in results.items():
        for kind, methods in kinds.items():
            for method, row in methods.items():
                speeds = {who: row["tokens_a_second"][who] for who in SIDES if who in row["tokens_a_second"]}
                ratios = {pair: rows.beside(value, row["goals"].get(pair)) for pair, value in row["values"].items()}
                yield {"part": part, "blocks x width": kind, "method": method} | speeds | ratios


COLUMNS = ["part", "blocks x width", "method", *SIDES, "ours/peft", "ours/hand", "ours/base", "merged/base"]


def main() -> None:
    choices = {"only": ["one row", "by row"], "sizes": list(SIZES), "methods": list(CASES), "counts": COUNTS}
    rows.main("decoding", __doc__, choices, run, lines, COLUMNS)


if __name__ == "__main__":
    main()
