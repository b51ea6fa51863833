"""Steps that fold adapters into weights, for good or until they are taken out."""

import torch

import lightning_peft as lp
from walks.checks import accuracy, close, require
from walks.methods import STATISTICS
from walks.nets import ALIASES


def mergeable(state, keep=False, dequantize=False):
    """Whether active adapters can be merged."""
    if not state.injected or state.merged:
        return False
    active = state.active_methods()
    adapted = {host for placed in active for host in placed.hosts}
    if adapted & state.quantized() and not dequantize:
        return False
    tied = {name.rpartition(".")[0] for pair in ALIASES.get(state.net, {}).items() for name in pair}
    if any(placed.spec["kind"] == "bottleneck" for placed in active):
        return False
    if any((placed.spec["kind"] != "tokens" or keep) and tied & set(placed.hosts) for placed in active):
        return False  # rows of tokens may be written into a shared weight, for good
    if not keep:
        return not state.inactive_methods()
    base = state.base
    changed = {n for n, t in state.merged_base().items() if n not in base or not torch.equal(t, base[n].double())}
    return not state.trained & changed


def merge(walk):
    """Merge for good: the model is a plain one again, with other weights."""
    state = walk.state
    legal = mergeable(state, keep=False)
    new = state.merged_base() if legal else {}
    if walk.attempt(legal, lambda: lp.merge(walk.model)) is None:
        return
    adopt_merged(walk, new)
    state.clear()


def adopt_merged(walk, new):
    """Compare the weights of a merged model with the oracle's, and take their bits as those of the base."""
    shown, dtype = walk.model.state_dict(), accuracy(walk.state)
    for name, value in new.items():
        require(name in shown, f"merging gave no {name}")
        close(shown[name], value, f"merged {name}", dtype)
        if name not in walk.state.base:
            walk.state.required.setdefault(name, walk.model.get_parameter(name).requires_grad)
        walk.state.base[name] = shown[name].detach().clone()


def merge_and_keep(walk):
    state = walk.state
    legal = mergeable(state, keep=True)
    if walk.attempt(legal, lambda: lp.merge(walk.model, keep=True)) is not None:
        state.merged = True
        check_merged(walk)


def check_merged(walk):
    """The weights in memory hold the adapters, whatever state dicts show."""
    for name, value in walk.state.merged_base().items():
        owner, _, key = name.rpartition(".")
        tensor = (walk.model.get_submodule(owner)._parameters | walk.model.get_submodule(owner)._buffers)[key]
        close(tensor, value, f"{name} in memory", accuracy(walk.state))


def unmerge(walk):
    state = walk.state
    if walk.attempt(state.merged, lambda: lp.unmerge(walk.model)) is not None:
        state.merged = False


def edit_while_merged(walk, number):
    """A write into weights that hold adapters would be lost, so that unmerge refuses until it is undone."""
    state = walk.state
    names = sorted(set(state.merged_base()) & set(state.base) - state.trained) if state.merged else []
    names = [name for name in names if not name.endswith(STATISTICS)]
    if names:
        owner, _, key = names[number % len(names)].rpartition(".")
        tensor = walk.model.get_submodule(owner)._parameters[key].data
        before = tensor.clone()
        tensor.add_(1)
        walk.attempt(False, lambda: lp.unmerge(walk.model))
        tensor.copy_(before)


WEIGHT_STEPS = {
    "merge": (lambda rng, walk: (), merge, 3),
    "merge(keep=True)": (lambda rng, walk: (), merge_and_keep, 6),
    "unmerge": (lambda rng, walk: () if walk.state.merged or rng.random() < 0.1 else None, unmerge, 25),
    "edit while merged": (lambda rng, walk: (rng.randrange(9),) if walk.state.merged else None, edit_while_merged, 8),
}
