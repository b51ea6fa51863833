"""Steps that add, switch and remove adapters: how each is drawn, when it must work, and what it does to the state."""

import torch

import lightning_peft as lp
from walks.methods import FIXED, PARAMETERS, draw, make, matching
from walks.nets import ALIASES
from walks.state import Placed, together

NAMES = ("a", "b", "c", "training", "a.b")


def free_name(rng, walk):
    """Return a name that is mostly free; sometimes one that is taken, or that no adapter can have."""
    taken = {placed.name for placed in walk.state.methods}
    free = [name for name in NAMES[:3] if name not in taken]
    return rng.choice(free) if free and rng.random() < 0.93 else rng.choice(NAMES)


def some_names(rng, walk, most=3):
    """Return different names, mostly known ones."""
    known = walk.state.names() or ["a"]
    names = rng.sample(known, rng.randint(1, min(most, len(known))))
    return (*names, "nobody") if rng.random() < 0.03 else tuple(names)


def drawn_methods(rng, walk):
    count = 2 if rng.random() < 0.25 else 1
    name = free_name(rng, walk)
    specs = [draw(rng, walk.net, name if number == 0 else f"{name}{number}") for number in range(count)]
    also = (rng.choice(PARAMETERS[walk.net]),) if rng.random() < 0.2 else ()
    return specs, also


def plan(state, specs, also):
    """Return (methods as placed, base parameters that train), or None where the base has no such thing."""
    placed, trained = [], set()
    for spec in specs:
        kind, targets = spec["kind"], spec["targets"]
        if kind == "bitfit" or kind == "bias":
            biases = [name for name in matching(targets, state.base) if "bias" in name.rpartition(".")[2]]
            hosts = [host for host in targets if f"{host}.bias" not in state.base] if kind == "bias" else []
            trained.update(biases)
            if not (biases or hosts):
                return None
        elif kind == "own":
            names = matching(targets, state.base)
            hosts = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        elif kind == "tokens":
            hosts = ("embed", "out") if state.net == "tied" else ("embed",)
        else:
            hosts = targets
        placed.append(Placed(spec, {host: {} for host in hosts}))
    names = set(matching(also, state.base))
    if also and not names:
        return None
    copied = {n for p in placed if p.spec["kind"] == "own" for n in matching(p.spec["targets"], state.base)}
    return placed, (trained | names) - copied


def names_are_free(state, placed):
    names = [p.name for p in (*state.methods, *placed)]
    return len(set(names)) == len(names) and not {"training", "a.b"} & set(names)


def copies(state, name, trained):
    """Return the method with copies of parameters that an inactive adapter has in place of training the base's."""
    hosts = dict.fromkeys(n.rpartition(".")[0] for n in state.base if n in trained)
    return Placed({"name": f"{name}_own", "kind": "own", "targets": tuple(sorted(trained))}, {h: {} for h in hosts})


def known_copies(placed, state):
    """Give planned copies the names of their tensors, so that rules can see them."""
    for p in placed:
        if p.spec["kind"] == "own":
            for host in p.hosts:
                for name in matching(p.spec["targets"], state.base, host):
                    p.hosts[host].setdefault(f"own.{name.rpartition('.')[2]}", torch.zeros(()))


def shared(state, placed):
    """Whether copies of shared parameters are asked for, which are refused."""
    names = set(ALIASES.get(state.net, {}).values())
    return any(p.spec["kind"] == "own" and names & set(matching(p.spec["targets"], state.base)) for p in placed)


def fill(walk, placed, seed):
    """Give new adapters random values, in the model and in the state."""
    generator = torch.Generator().manual_seed(seed)
    for p in placed:
        for host in p.hosts:
            adapter = walk.model.get_submodule(f"{host}.peft.{p.name}")
            for key, tensor in adapter.state_dict(keep_vars=True).items():
                fixed = key in FIXED or not isinstance(tensor, torch.nn.Parameter)
                if not fixed:
                    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.data.add_(0.3 * noise)
            p.hosts[host] = {key: t.detach().clone() for key, t in adapter.state_dict().items()}


def below_a_copy(state, placed, trained):
    """Whether a parameter would train in the base while an adapter that is not of a group has a copy of it."""
    known_copies(placed, state)
    grouped = {name for names in state.groups.values() for name in names}
    copied = {name for p in state.methods if p.name not in grouped for name in p.replaced()}
    return bool(trained & copied or state.trained & {name for p in placed for name in p.replaced()})


def inject(walk, specs, also, seed):
    state = walk.state
    planned = plan(state, specs, also)
    legal = (
        planned is not None and not state.merged and names_are_free(state, planned[0]) and not shared(state, planned[0])
    )
    if legal:
        placed, trained = planned
        known_copies(placed, state)
        legal = together([*state.active_methods(), *placed]) if not below_a_copy(state, *planned) else False
        if not (trained or any(p.hosts for p in placed)):
            legal = False
    methods = [make(spec) for spec in specs]
    if walk.attempt(legal, lambda: lp.inject(walk.model, methods, also)) is None:
        return
    fill(walk, placed, seed)
    state.injected = True
    state.methods += placed
    state.active += [p.name for p in placed]
    state.trained |= trained


def add(walk, specs, also, seed):
    state = walk.state
    planned = plan(state, specs, also)
    legal = planned is not None and not state.merged
    if planned is not None:
        placed, trained = planned
        for number, p in enumerate(placed):
            p.spec = {**p.spec, "name": specs[0]["name"] if number == 0 else f"{specs[0]['name']}_{number + 1}"}
        placed = [*placed, copies(state, specs[0]["name"], trained)] if trained else placed
        known_copies(placed, state)
        legal = legal and names_are_free(state, placed) and not shared(state, placed)
        legal = legal and together(placed)
    methods = [make(spec) for spec in specs]
    if walk.attempt(legal, lambda: lp.add_adapter(walk.model, methods, also_train=also)) is None:
        return
    fill(walk, placed, seed)
    state.injected = True
    state.methods += placed
    if len(placed) > 1:
        state.groups[placed[0].name] = [p.name for p in placed]


def activate(walk, *names):
    state = walk.state
    legal = state.injected and not state.merged and set(names) <= set(state.names())
    if legal:
        chosen = [placed for name in names for placed in state.members(name)]
        without = [p for p in state.methods if p not in chosen and not p.hosts and state.trained_alone(p)]
        legal = False if without else together(chosen)
    if walk.attempt(legal, lambda: lp.activate(walk.model, *names)) is not None:
        state.active = list(names)


def remove(walk, name):
    state = walk.state
    legal = state.injected and not state.merged and name in state.names()
    if legal:
        members = state.members(name)
        legal = not any(state.trained_alone(p) for p in members)
        if any(p.spec["kind"] == "bitfit" and not matching(p.spec["targets"], state.base) for p in members):
            legal = None
    if walk.attempt(legal, lambda: lp.remove_adapter(walk.model, name)) is None:
        return
    if len(members) == len(state.methods) and not state.trained:
        state.clear()
        return
    state.methods = [p for p in state.methods if p not in members]
    state.groups.pop(name, None)
    state.active = [active for active in state.active if active != name]


def detach(walk):
    if walk.attempt(not walk.state.merged, lambda: lp.detach(walk.model)) is not None:
        walk.state.clear()


ADAPTER_STEPS = {  # how arguments are drawn, what is done, how often
    "inject": (lambda rng, walk: (*drawn_methods(rng, walk), rng.randrange(10**6)), inject, 12),
    "add_adapter": (lambda rng, walk: (*drawn_methods(rng, walk), rng.randrange(10**6)), add, 10),
    "activate": (lambda rng, walk: some_names(rng, walk), activate, 12),
    "remove_adapter": (lambda rng, walk: some_names(rng, walk, 1)[:1], remove, 4),
    "detach": (lambda rng, walk: (), detach, 2),
}
