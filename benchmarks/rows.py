"""What a benchmark finds: ratios beside their goals, printed one by one, kept in a file, shown as a table."""

import argparse
import gc
import logging
import statistics
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch

Row = tuple[str, str, str, dict[str, Any]]  # part, model, method, and what was found
Goals = dict[str, float | None]


def found(values: dict[str, float], goals: Goals, **more: Any) -> dict[str, Any]:
    return {"values": {name: round(value, 4) for name, value in values.items()}, "goals": goals, **more}


def timed(
    goals: Goals, options: Namespace, functions: dict[str, Callable], setup: Callable | None = None
) -> dict[str, Any]:
    """Time functions side by side; the goals' keys, such as ours/peft, name the ratios."""
    times = harness.paired(functions, options.rounds, options.budget, setup)
    values = {pair: harness.ratio(times, *pair.split("/")) for pair in goals}
    seconds = {name: round(statistics.median(of_rounds), 6) for name, of_rounds in times.items()}
    return found(values, goals, seconds=seconds, rounds=len(next(iter(times.values()))))


def beside_goals(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a line of the table for each value."""
    for part, kinds in results.items():
        for kind, methods in kinds.items():
            for method, row in methods.items():
                for name, value in row["values"].items():
                    goal = row["goals"].get(name)
                    reached = (
                        {} if goal is None else {"goal": f"<= {goal}", "reached": "yes" if value <= goal else "no"}
                    )
                    yield {"part": part, "model": kind, "method": method, "of": name, "value": value} | reached


def beside(value: float, goal: float | None) -> str:
    """Return a ratio beside the goal that it reaches or misses."""
    if goal is None:
        return f"{value:.2f}"
    return f"{value:.2f} {'<=' if value <= goal else '>'} {goal}"


COLUMNS = ["part", "model", "method", "of", "value", "goal", "reached"]


def main(
    name: str,
    description: str,
    choices: dict[str, list[str]],
    run: Callable[[Namespace], Iterator[Row]],
    lines: Callable[[dict[str, Any]], Iterator[dict[str, Any]]] = beside_goals,
    columns: list[str] = COLUMNS,
) -> None:
    """Run a benchmark from the command line.

    Args:
        name: Name of its file of results.
        description: Help.
        choices: By option, what a comma-separated list may choose from; by default everything.
        run: Yields what it finds.
        lines: Yields the lines of the table, of results by part, model and method.
        columns: Of the table.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs; nothing is written")
    parser.add_argument("--print-only", action="store_true", help="write nothing")
    parser.add_argument("--rounds", type=int, default=9, help="of every paired measurement")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds after which a measurement stops early")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than one is unsteady on shared cores")
    for option, known in choices.items():
        parser.add_argument(f"--{option}", type=_some_of(known), default=known, help=",".join(known))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.small:
        gc.freeze()  # else most of the time goes into looking for garbage among what was imported
    results = {}
    for part, kind, method, row in run(options):
        new = {part: {kind: {method: row}}}
        unwritten = options.small or options.print_only
        results = harness.merge(results, new) if unwritten else harness.write(new, name)
        for line in lines(new):
            print(*line.values(), flush=True)
    print(harness.table(list(lines(results)), columns))


def _some_of(known: list[str]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
        return text.split(",")

    return chosen
