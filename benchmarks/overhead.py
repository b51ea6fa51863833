"""What a call of microseconds costs: exact counts and saved bytes, and CPU time in turns."""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import counting
import harness
import torch
from rows import Goals, found
from sides import known
from torch import Tensor, nn

TURN_S = 0.01  # of calls of one side before it is another's turn


def measured(sides: dict[str, nn.Module], x: Tensor, train: bool, goals: Goals, options: Namespace) -> dict[str, Any]:
    """Return counts, times and ratios of a training step or of an eval forward."""
    calls = {who: (train_call if train else eval_call)(module, x) for who, module in sides.items()}
    counts = {who: counting.operators(call) for who, call in calls.items()}
    more = {
        "operators": {who: count[0] for who, count in counts.items()},
        "kernels": {who: count[1] for who, count in counts.items()},
        "frames": {who: counting.frames(call) for who, call in calls.items()},
    }
    if train:
        loss = lambda module, batch: output_of(module, x).square().sum()  # noqa: E731
        more["bytes"] = {who: harness.saved_bytes(loss, module, {}) for who, module in sides.items()}
    return timed(known(goals, sides), options, calls) | more


def timed(goals: Goals, options: Namespace, calls: dict[str, Callable[[], None]]) -> dict[str, Any]:
    """Time calls of microseconds: many of one side, then as many of another, by the CPU time of this thread."""
    number = 1 if options.small else max(1, int(TURN_S / seconds(next(iter(calls.values())))))
    turns = {who: partial(repeat, call, number) for who, call in calls.items()}
    times = harness.paired(turns, options.rounds, options.budget, clock=time.thread_time)
    each, fastest = (
        {who: round(1e6 * pick(of_turns) / number, 1) for who, of_turns in times.items()}
        for pick in (statistics.median, min)
    )
    ratios = {pair: harness.ratio(times, *pair.split("/")) for pair in goals}
    return found(ratios, goals, microseconds=each, fastest_microseconds=fastest)


def seconds(call: Callable[[], None]) -> float:
    call()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def repeat(call: Callable[[], None], number: int) -> None:
    for _ in range(number):
        call()


def output_of(module: nn.Module, x: Tensor) -> Tensor:
    return module(x) if x.is_floating_point() else module(input_ids=x).logits


def train_call(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return forward and backward, with gradients that the next call does not add to."""
    trained, gradient = harness.trained(module.train()), torch.randn_like(output_of(module, x))
    leaves = [*trained, x] if x.requires_grad else trained

    def call() -> None:
        output_of(module, x).backward(gradient)
        for leaf in leaves:
            leaf.grad = None

    return call


def eval_call(module: nn.Module, x: Tensor) -> Callable[[], None]:
    return torch.no_grad()(partial(output_of, module.eval(), x))
