"""Four threads over one model: each activates, disables and mixes adapters for itself, and compares its own outputs."""

import random
import threading
from collections import Counter

import torch

import lightning_peft as lp
from walks.checks import Violation, accuracy, check, close, fed
from walks.steps_adapters import activate, some_names
from walks.steps_contexts import disabled, draw_names, rows
from walks.walk import Walk, begin

THREADS = 4
# torch may wait forever where two threads at once make the gradient node of one parameter: the first has its mutex and
# waits for Python's lock, the second the other way round.
WITH_GRADIENTS = threading.Lock()


class Visitor:
    """What steps need of a walk, for one thread: the shared model, and a state with what this thread has activated."""

    attempt = Walk.attempt

    def __init__(self, walk):
        self.net, self.model, self.step, self.count = walk.net, walk.model, None, Counter()
        self.state = walk.state.copy()


def look(visitor):
    """Compare the plain output, without or with gradients."""
    expected = visitor.state.output()
    for mode, what in ((torch.no_grad(), "the output"), (WITH_GRADIENTS, "the output with gradients")):
        with mode:
            close(visitor.model(fed(visitor.state)), expected, f"{what} in a thread", accuracy(visitor.state))
    if lp.active(visitor.model) != tuple(visitor.state.active):
        raise Violation(f"active in this thread are {lp.active(visitor.model)}, not {visitor.state.active}")
    visitor.count["call", "done"] += 1


THREAD_STEPS = {
    "activate": (some_names, activate, 4),
    "disabled": (lambda rng, visitor: (None,), disabled, 2),
    "row_adapters": (lambda rng, visitor: (draw_names(rng, visitor), None), rows, 3),
    "call": (lambda rng, visitor: (), look, 3),
}


def visit(visitor, seed, steps, failures, started):
    """Take random steps in one thread; the first that fails is kept with those before it."""
    rng, taken = random.Random(seed), []  # noqa: S311
    names, weights = list(THREAD_STEPS), [weight for *_, weight in THREAD_STEPS.values()]
    started.wait()
    try:
        for _ in range(steps):
            (name,) = rng.choices(names, weights)
            taken.append((name, THREAD_STEPS[name][0](rng, visitor)))
            visitor.step = taken[-1]
            THREAD_STEPS[name][1](visitor, *taken[-1][1])
            look(visitor)
    except Exception as error:
        failures.append((f"{type(error).__name__}: {error}", taken))


def walk_in_threads(seed, folder, count, steps=12):
    """Let four threads step over a model with several adapters; return what failed, or None."""
    rng = random.Random(seed)  # noqa: S311
    walk, prepared = begin(rng, folder, Counter())
    visitors = [Visitor(walk) for _ in range(THREADS)]
    failures, started = [], threading.Barrier(THREADS)
    threads = [
        threading.Thread(target=visit, args=(visitor, rng.randrange(10**6), steps, failures, started))
        for visitor in visitors
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for visitor in visitors:
        count.update(visitor.count)
    if not failures:
        try:
            check(walk.model, walk.state)  # what the main thread has is as before
        except Violation as violation:
            failures.append((str(violation), []))
    return failures and (walk.net, prepared, failures)
