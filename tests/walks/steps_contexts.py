"""Steps through contexts, in which other adapters, none, or merged ones are active; others are tried inside."""

import copy

import torch

import lightning_peft as lp
from walks.checks import accuracy, check, close, fed
from walks.nets import inputs
from walks.steps_adapters import ADAPTER_STEPS, activate, add, detach, inject, remove
from walks.steps_files import save
from walks.steps_weights import merge, merge_and_keep, mergeable

REFUSED = {
    "inject": inject,
    "add_adapter": add,
    "activate": activate,
    "remove_adapter": remove,
    "detach": detach,
    "merge": merge,
    "merge(keep=True)": merge_and_keep,
}
INSIDE = (None, *REFUSED, "row_adapters", "disabled", "save_adapter", "deepcopy")


def draw_inside(rng, walk):
    name = rng.choice(INSIDE)
    if name == "save_adapter":
        return name, (None, len(walk.saved))
    return None if name is None else (name, ADAPTER_STEPS[name][0](rng, walk) if name in ADAPTER_STEPS else ())


def take_inside(walk, inside):
    """Take a step within a context; return a copy that was made there, which is not in the context."""
    if inside is None:
        return None
    name, args = inside
    before, walk.step = walk.step, (f"{name} inside", args)
    merged, walk.state.merged = walk.state.merged, True  # for what is refused here, all contexts are as one
    twin = None
    if name in REFUSED:
        REFUSED[name](walk, *args)
    elif name == "row_adapters":
        walk.attempt(False, lambda: lp.row_adapters(walk.model, [None]).__enter__())
    elif name == "save_adapter":
        walk.state.merged = merged
        save(walk, *args)
    elif name == "disabled" and (merged or not can_be_disabled(walk.state, inside=True)):
        pass
    elif name == "disabled":
        with lp.disabled(walk.model), torch.no_grad():
            close(walk.model(fed(walk.state)), walk.state.output([]), "the output inside", accuracy(walk.state))
    elif not merged:
        twin = copy.deepcopy(walk.model)
    walk.state.merged, walk.step = merged, before
    return twin


def merged_for_a_while(walk, inside):
    """The context: within, nothing else may change; a refusal inside is one of the inner step."""
    legal = mergeable(walk.state, keep=True)
    context = lp.merged(walk.model)
    if walk.attempt(legal, lambda: context.__enter__() is None) is None:
        return
    walk.state.merged = True
    close(walk.model(fed(walk.state)), walk.state.output(), "the output within merged()", accuracy(walk.state))
    take_inside(walk, inside)
    walk.state.merged = False
    context.__exit__(None, None, None)


def can_be_disabled(state, inside=False):
    return (
        state.injected
        and (inside or not state.merged)
        and not state.trained
        and any(placed.hosts for placed in state.methods)
    )


def disabled(walk, inside):
    state = walk.state
    context = lp.disabled(walk.model)
    if walk.attempt(can_be_disabled(state), lambda: context.__enter__() is None) is None:
        return
    with torch.no_grad():
        close(walk.model(fed(state)), state.output([]), "the output within disabled()", accuracy(state))
    twin = take_inside(walk, inside)
    context.__exit__(None, None, None)
    if twin is not None:
        check(twin, state)


def can_be_batched(state, names):
    used = [placed for name in dict.fromkeys(names) if name is not None for placed in state.members(name)]
    if not state.injected or state.merged or not {*names} - {None} <= set(state.names()):
        return False
    if any(state.trained_alone(placed) for placed in used):
        return False
    read = any(host.startswith("attn") for placed in used for host in placed.hosts)
    if read or any(placed.spec["kind"] == "bias" and placed.hosts for placed in used):
        return False
    copied = [
        (name, host) for name in {*names} - {None} for p in state.members(name) if p.replaced() for host in p.hosts
    ]
    if len(set(copied)) < len(copied):
        return False  # copies by two methods of one name
    return None if any(placed.spec["kind"] in ("bitfit", "bias") for placed in used) else True


def rows(walk, names, inside):
    state = walk.state
    context = lp.row_adapters(walk.model, list(names))
    if walk.attempt(can_be_batched(state, names), lambda: context.__enter__() is None) is None:
        return
    with torch.no_grad():
        y = walk.model(fed(state))
    for row, name in enumerate(names):
        x = inputs(state.net)[row : row + 1]
        expected = state.output([] if name is None else state.members(name), x)
        close(y[row : row + 1], expected, f"row {row} of {names}", accuracy(state))
    twin = take_inside(walk, inside)
    context.__exit__(None, None, None)
    if twin is not None:
        check(twin, state)


def draw_names(rng, walk):
    known = [*(walk.state.names() or ["a"]), None]
    return tuple(rng.choice(known) for _ in range(3))


CONTEXT_STEPS = {
    "merged": (lambda rng, walk: (draw_inside(rng, walk),), merged_for_a_while, 4),
    "disabled": (lambda rng, walk: (draw_inside(rng, walk),), disabled, 6),
    "row_adapters": (lambda rng, walk: (draw_names(rng, walk), draw_inside(rng, walk)), rows, 8),
}
