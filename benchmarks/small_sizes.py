"""python benchmarks/small_sizes.py: each method where overhead counts; writes results/small_sizes.json.

Operators (dispatched, exact), Python frames, saved bytes and CPU time of a training step (forward and backward) and of
an eval forward, on one layer and on small Llamas: this package, HF peft and a hand-written form, in turns, in one
process. Where adapters 1.3 is installed, which needs transformers 4.57, it is a side of models as well, and the file is
results/small_sizes_adapters.json. With --small the sizes are tiny, the numbers mean nothing, and nothing is written.

    python benchmarks/small_sizes.py --methods lora,dora --only layer --widths 64 --tokens 1,128 --print-only
"""

import gc
import itertools
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import rows
import torch
from layer_sides import ADAPTERS, ON_LAYER, OTHERS, TRAIN, sides_of
from llama_sides import CASES, HAS_ADAPTERS, model_sides, small_llama
from overhead import measured
from rows import Row
from torch import Tensor, nn

SIZES = {  # of which --small takes the first
    "widths": [64, 512, 2048],
    "tokens": [1, 16, 128, 2048],
    "depths": [2, 6, 16],
    "model_tokens": [1, 2, 48],
}
SIDES = ("ours", "peft", "hand", "adapters")
METHODS = list(ON_LAYER | CASES)


def on_layer(name: str, options: Namespace) -> Iterator[Row]:
    for width, tokens in itertools.product(options.widths, options.tokens):
        x = torch.randn(1, int(tokens), int(width), requires_grad=True)
        sides = sides_of(ON_LAYER[name], int(width))
        yield from both_modes("layer", f"{width} wide, {tokens} tokens", name, sides, x, options)


def in_model(name: str, options: Namespace) -> Iterator[Row]:
    for depth in options.depths:
        sides = model_sides(name, partial(small_llama, int(depth)))
        for tokens in options.model_tokens:
            ids = torch.randint(0, 256, (1, int(tokens)))
            yield from both_modes("model", f"{depth} blocks, {tokens} tokens", name, sides, ids, options)


def both_modes(
    part: str, kind: str, name: str, sides: dict[str, nn.Module], x: Tensor, options: Namespace
) -> Iterator[Row]:
    goals = {True: TRAIN.get(name, OTHERS) | ADAPTERS, False: OTHERS | ADAPTERS}
    for train in (True, False):
        mode = "train" if train else "eval"
        if mode in options.modes:
            yield f"{part} {mode}", kind, name, measured(sides, x, train, goals[train], options)


def run(options: Namespace) -> Iterator[Row]:
    gc.freeze()  # else each round looks for garbage among all that was imported
    for option in SIZES if options.small else ():
        setattr(options, option, getattr(options, option)[:1])
    for name in options.methods:
        if name in ON_LAYER and "layer" in options.only:
            yield from on_layer(name, options)
        if name in CASES and "model" in options.only:
            yield from in_model(name, options)


def lines(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a line of the table for each measurement: costs of ours / peft / hand, where they are."""
    for part, kinds in results.items():
        for kind, methods in kinds.items():
            for method, row in methods.items():
                costs = ("operators", "kernels", "frames", "microseconds", "bytes")
                cells = {
                    cost: " / ".join(str(row[cost][who]) for who in SIDES if who in row.get(cost, {})) for cost in costs
                }
                ratios = {pair: rows.beside(value, row["goals"].get(pair)) for pair, value in row["values"].items()}
                yield {"part": part, "size": kind, "method": method} | cells | ratios


COLUMNS = [
    "part",
    "size",
    "method",
    "operators",
    "kernels",
    "frames",
    "bytes",
    "microseconds",
    "ours/peft",
    "ours/hand",
]


def main() -> None:
    sizes = {name: [str(size) for size in each] for name, each in SIZES.items()}
    choices = {"only": ["layer", "model"], "modes": ["train", "eval"], "methods": METHODS} | sizes
    name = "small_sizes_adapters" if HAS_ADAPTERS else "small_sizes"  # in other versions, so in a file of their own
    rows.main(name, __doc__, choices, run, lines, COLUMNS)


if __name__ == "__main__":
    main()
