"""``Walk``: a model and an oracle's state that take random steps together; ``shrink`` finds the shortest that fails."""

import random
import traceback

import torch

from walks.checks import Violation, check, digest
from walks.nets import NETS, build
from walks.state import State
from walks.steps_adapters import ADAPTER_STEPS
from walks.steps_contexts import CONTEXT_STEPS
from walks.steps_files import FILE_STEPS
from walks.steps_imports import IMPORT_STEPS
from walks.steps_quantized import QUANTIZED_STEPS
from walks.steps_values import VALUE_STEPS
from walks.steps_weights import WEIGHT_STEPS

STEPS = ADAPTER_STEPS | WEIGHT_STEPS | CONTEXT_STEPS | QUANTIZED_STEPS | VALUE_STEPS | FILE_STEPS | IMPORT_STEPS
REFUSALS = (ValueError, TypeError, RuntimeError)


class Walk:
    """A model, what it must hold, and a count of what was called.

    Args:
        net: Name of a network.
        folder: Where to write files.
        count: Counts by (step, "done" or "refused").
    """

    def __init__(self, net, folder, count):
        self.net, self.folder, self.count, self.step = net, folder, count, None
        self.model = build(net)
        base = {name: t.detach().clone() for name, t in self.model.state_dict().items() if name != "out.weight"}
        self.state = State(net, base, {n: p.requires_grad for n, p in self.model.named_parameters()})
        self.saved, self.kept = {}, []

    def attempt(self, legal, call):
        """Make a call that must work (True), be refused (False) or may be either (None); return whether it worked."""
        before = None if legal else digest(self.model)
        try:
            result = call()
        except REFUSALS as error:
            if legal:
                raise Violation(f"{self.step} was refused: {error}") from error
            if digest(self.model) != before:
                raise Violation(f"{self.step} was refused and changed the model: {error}") from error
            self.count[self.step[0], "refused"] += 1
            return None
        except Exception as error:
            raise Violation(f"{self.step} raised a bare {type(error).__name__}: {error}") from error
        if legal is False:
            raise Violation(f"{self.step} should have been refused")
        self.count[self.step[0], "done"] += 1
        return result

    def take(self, step):
        """Take one step, given as (name, arguments), and compare the model with the state."""
        self.step = step
        try:
            STEPS[step[0]][1](self, *step[1])
            check(self.model, self.state)
        except REFUSALS as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise Violation(f"{step[0]} failed at {place.filename}:{place.lineno}: {error}") from error


def replay(net, steps, folder, count):
    """Take steps from the beginning; return (number of the first that fails, what failed), or None."""
    walk = Walk(net, folder, count)
    for number, step in enumerate(steps):
        try:
            walk.take(step)
        except Violation as violation:
            return number, str(violation)
    return finish(walk, len(steps))


def finish(walk, number):
    """Compare models of which copies were made with what they were."""
    for model, before in walk.kept:
        if digest(model) != before:
            return number, "a model changed with its copy"
    return None


def walk_at_random(seed, folder, count):
    """Take 3 to 12 random steps; return None, or the network, the steps and what failed at the last one."""
    rng = random.Random(seed)  # noqa: S311
    torch.manual_seed(seed)
    walk, steps = Walk(rng.choice(list(NETS)), folder, count), []
    names, weights = list(STEPS), [weight for _, _, weight in STEPS.values()]
    for number in range(rng.randint(3, 12)):
        (name,) = rng.choices(names, weights)
        if number == 0 and rng.random() < 0.9:
            name = rng.choice(("inject", "add_adapter"))
        step = name, STEPS[name][0](rng, walk)
        if step[1] is None:
            continue
        steps.append(step)
        try:
            walk.take(step)
        except Violation as violation:
            return walk.net, steps, str(violation)
    failed = finish(walk, len(steps))
    return failed and (walk.net, steps, failed[1])


def begin(rng, folder, count):
    """Return a walk over a model with several adapters, and the steps that added them."""
    walk, steps = Walk(rng.choice(list(NETS)), folder, count), []
    for name in ("add_adapter", "add_adapter", "inject", "add_adapter", "activate"):
        step = name, STEPS[name][0](rng, walk)
        steps.append(step)
        walk.take(step)
    return walk, steps


def shrink(net, steps, folder, count):
    """Return the fewest of these steps that fail, and what fails, by leaving out one after the other."""
    failed = replay(net, steps, folder, count)
    if failed is None:
        return steps, "fails no more when it is taken again"
    steps, position = steps[: failed[0] + 1], 0
    while position < len(steps):
        fewer = steps[:position] + steps[position + 1 :]
        if (again := replay(net, fewer, folder, count)) is not None:
            steps, failed = fewer[: again[0] + 1], again
        else:
            position += 1
    return steps, failed[1]


def as_text(net, steps, failed):
    """Return a failed walk in lines that ``replay`` takes again."""
    return "\n".join(
        [f"{failed}", f"replay({net!r}, [", *(f"    {step!r}," for step in steps), "], folder, Counter())"]
    )
