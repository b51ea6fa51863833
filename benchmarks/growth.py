"""python benchmarks/growth.py: how a training step's time and saved bytes grow with what there is more of.

One thing takes several sizes, all else stays: the rank (one layer of width 512, 64 tokens); blocks, tokens of a row,
rows, and adapters of which one is active (a Llama of width 64); and the adapters that 64 rows of a batch use in turns,
in evaluation, as peft has no training of such batches. An exponent is the slope of the logarithm over that of the size,
by least squares: 1 is linear, 0 no growth; ``last`` is that between the two largest sizes. This package and HF peft
take turns in one process; CPU time counts. Writes results/growth.json. With --small there are the two smallest sizes,
the numbers mean nothing, and nothing is written.
"""

import gc
import itertools
import math
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import rows
import torch
from layer_sides import LAYER, low_rank, sides_of
from llama_sides import CASES, model_sides, small_llama
from many_adapters import ALONE, BY_ROW, ROWS, ByRow, many_adapters
from overhead import measured
from rows import Row, found
from sides import called
from torch import Tensor, nn

SIZES = {
    "rank": [4, 16, 64, 256],
    "blocks": [1, 2, 4, 8, 16],  # of two adapted layers each, where a method adapts queries and values
    "tokens": [2, 16, 128, 1024],
    "rows": [1, 8, 64],
    "adapters": [1, 8, 64],
    "adapters in a batch": [1, 8, 64],
}
METHODS = {name: list(CASES) for name in SIZES} | {
    "rank": [name for name in low_rank(LAYER) if name != "krona"],  # which has none
    "adapters": [name for name in CASES if name not in ALONE],
    "adapters in a batch": list(BY_ROW),
}
Sides = tuple[dict[str, nn.Module], Tensor]


def by_rank(name: str, rank: int) -> Sides:
    sides = sides_of(low_rank(LAYER, rank)[name], 512)
    return sides, torch.randn(1, 64, 512, requires_grad=True)


def in_model(name: str, blocks: int = 2, count: int = 1, tokens: int = 16) -> Sides:
    sides = model_sides(name, partial(small_llama, blocks))
    return sides, torch.randint(0, 256, (count, tokens))


def one_of(name: str, count: int) -> Sides:
    """Return both sides with as many adapters, of which one is active."""
    sides = many_adapters(name, count, partial(small_llama, 2))
    return {who: called(side) for who, side in sides.items()}, torch.randint(0, 256, (1, 16))


def by_row(name: str, count: int) -> Sides:
    """Return both sides with as many adapters in one batch."""
    sides = many_adapters(name, count, partial(small_llama, 2))
    if not name.startswith("lora"):
        sides.pop("peft", None)
    names = [f"a{row % count}" for row in range(ROWS)]
    return {who: ByRow(side, names) for who, side in sides.items()}, torch.randint(0, 256, (ROWS, 16))


BUILD: dict[str, Callable[[str, int], Sides]] = {
    "rank": by_rank,
    "blocks": in_model,
    "tokens": lambda name, size: in_model(name, tokens=size),
    "rows": lambda name, size: in_model(name, count=size),
    "adapters": one_of,
    "adapters in a batch": by_row,
}


def grown(what: str, name: str, options: Namespace) -> dict[str, Any]:
    """Measure each size, and return the exponents of time and of saved bytes."""
    sizes, train = SIZES[what][: 2 if options.small else None], what != "adapters in a batch"
    costs: dict[str, dict[str, list[float]]] = {"microseconds": {}, "bytes": {}}
    for size in sizes:
        sides, x = BUILD[what](name, size)
        sides = {who: side for who, side in sides.items() if who in ("ours", "peft")}
        row = measured(sides, x, train, {}, options)
        for cost, who in itertools.product(costs, sides):
            costs[cost].setdefault(who, []).append(row.get(cost, {}).get(who))
    values = {}
    for (cost, of), part in itertools.product(costs.items(), (slice(None), slice(-2, None))):
        for who, each in of.items():
            if None not in each:
                values[f"{who} {cost}{' last' if part.start else ''}"] = exponent(sizes[part], each[part])
    return found(values, {}, sizes=sizes, **costs)


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Return the slope of log(cost) over log(size) by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    return statistics.linear_regression(x, y).slope


def run(options: Namespace) -> Iterator[Row]:
    gc.freeze()  # else each round looks for garbage among all that was imported
    for what in options.only:
        for name in METHODS[what]:
            if name in options.methods:
                yield what, "small", name, grown(what, name, options)


def lines(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a line of the table for each method: the exponent over all sizes, and that between the last two."""
    for what, kinds in results.items():
        for method, row in kinds["small"].items():
            pairs = {name: row["values"][name] for name in row["values"] if not name.endswith("last")}
            cells = {name: f"{value:.2f}, {row['values'][f'{name} last']:.2f}" for name, value in pairs.items()}
            yield {"with": what, "sizes": " ".join(map(str, row["sizes"])), "method": method} | cells


COLUMNS = ["with", "sizes", "method", "ours microseconds", "peft microseconds", "ours bytes", "peft bytes"]


def main() -> None:
    rows.main("growth", __doc__, {"only": list(SIZES), "methods": list(CASES)}, run, lines, COLUMNS)


if __name__ == "__main__":
    main()
