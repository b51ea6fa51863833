"""Steps that change values or types: training, edits of the base, casts, copies, combinations, quantization."""

import copy
import pickle

import torch

import lightning_peft as lp
from walks.checks import accuracy, close, digest, dtype_of, fed, require
from walks.methods import STATISTICS
from walks.nets import inputs
from walks.oracle import DELTAS
from walks.state import Placed

RATE = 0.05


def loss_of(y):
    return (y.tanh() * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def train(walk):
    """One optimizer step over everything that trains; the oracle's gradients are those of its formulas."""
    state = walk.state
    if not state.injected or state.merged or dtype_of(state) != torch.float64:
        return
    parameters = {name: p for name, p in walk.model.named_parameters() if p.requires_grad}
    if not parameters:
        return
    optimizer = torch.optim.SGD(parameters.values(), RATE)
    loss_of(walk.model(fed(state))).backward()
    optimizer.step()
    optimizer.zero_grad()
    for name, (value, adopt) in stepped(state).items():
        close(parameters[name], value, f"{name} after a step", accuracy(state))
        adopt(parameters[name].detach().clone())
    walk.count["step", "done"] += 1


def stepped(state):
    """Return for each parameter that trains its value after a step, and how to write another into the state."""
    leaves, adopt = {}, {}
    for name in sorted(state.trained):
        state.base[name] = leaves[name] = state.base[name].clone().requires_grad_()
        adopt[name] = lambda value, name=name: state.base.__setitem__(name, value)
    for placed in state.active_methods():
        for host, tensors in placed.hosts.items():
            for key in [k for k in tensors if trains(k)]:
                name = f"{host}.peft.{placed.name}.{key}"
                tensors[key] = leaves[name] = tensors[key].clone().requires_grad_()
                adopt[name] = lambda value, tensors=tensors, key=key: tensors.__setitem__(key, value)
    loss = loss_of(state.output())
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    with torch.no_grad():
        pairs = zip(leaves.items(), gradients, strict=True)
        return {n: (p - RATE * (0 if g is None else g), adopt[n]) for (n, p), g in pairs}


def trains(key):
    return key not in ("a0", "b0", "kept", "mean", "spread") and not key.startswith(("own.running", "own.num"))


def write_in_place(tensor, value):
    with torch.no_grad():
        tensor.copy_(value)


EDITS = {
    "in place": write_in_place,
    "through data": lambda tensor, value: tensor.data.copy_(value),
    "through numpy": lambda tensor, value: tensor.detach().numpy().__setitem__(slice(None), value.numpy()),
    "new data": lambda tensor, value: setattr(tensor, "data", value.clone()),
}


def edit(walk, name, way, seed):
    """The user writes other values into a frozen parameter of the base."""
    state = walk.state
    editable = name in state.base and state.base[name].is_floating_point() and dtype_of(state) != torch.bfloat16
    if not editable or state.merged or name in state.trained:
        return
    noise = torch.randn(state.base[name].shape, generator=torch.Generator().manual_seed(seed))
    state.base[name] = state.base[name] + 0.2 * noise.to(state.base[name].dtype)
    owner, _, key = name.rpartition(".")
    EDITS[way](walk.model.get_submodule(owner)._parameters[key], state.base[name])
    walk.count["edit", "done"] += 1


def cast(walk, to):
    state, dtype = walk.state, getattr(torch, to)
    if state.merged:
        return  # what was overwritten has another type then, so that unmerge is refused; tested elsewhere
    walk.model.to(dtype)
    cast_too = {n for n, t in state.base.items() if t.is_floating_point() and not n.endswith("scale")}
    state.base = {n: t.to(dtype) if n in cast_too else t for n, t in state.base.items()}
    for placed in state.methods:
        for tensors in placed.hosts.values():
            tensors.update({key: t.to(dtype) if is_statistic(key) else widened(t, dtype) for key, t in tensors.items()})
    walk.count["cast", "done"] += 1


def is_statistic(key):
    """Whether a tensor is a copy of a norm's statistics, which have the type of those that they stand for."""
    return key.startswith("own.running")


def widened(tensor, dtype):
    """Adapters keep their type where another would be narrower."""
    narrower = torch.finfo(dtype).bits < torch.finfo(tensor.dtype).bits if tensor.is_floating_point() else True
    return tensor if narrower else tensor.to(dtype)


def copied(walk, way):
    """Go on with a copy; the model that it was made from must stay as it is."""
    twin = copy.deepcopy(walk.model) if way == "deepcopy" else pickle.loads(pickle.dumps(walk.model))  # noqa: S301
    if way == "deepcopy" and len(walk.kept) < 2:
        walk.kept.append((walk.model, digest(walk.model)))
    walk.model = twin
    walk.count[way, "done"] += 1


def switch_mode(walk):
    """Training mode and back, which drops what evaluation kept."""
    walk.model.train().eval()
    walk.count["train and eval", "done"] += 1


LOW_RANK = ("lora", "rslora", "pissa", "adalora")


def combine(walk, names, weights, name):
    """A sum of low-rank updates, as a new LoRA of a rank that holds it exactly."""
    state = walk.state
    taken = {placed.name for placed in state.methods}
    known = state.injected and set(names) <= set(state.names()) and name not in taken and not state.merged
    groups = [state.members(n) for n in names] if known else []
    plain = known and all(len(g) == 1 and g[0].spec["kind"] in DELTAS for g in groups)
    exact = plain and all(g[0].spec["kind"] in LOW_RANK for g in groups)
    hosts = [set(g[0].hosts) for g in groups] if plain else []
    legal = bool(plain) and all(h == hosts[0] for h in hosts)
    rank = sum(g[0].spec["rank"] * (2 if g[0].spec["kind"] == "pissa" else 1) for g in groups) if exact else 2
    if legal and rank > 3:  # above the smaller side of some layers
        legal = None
    call = lambda: lp.combine(walk.model, names, weights, name, rank=rank)  # noqa: E731
    if walk.attempt(legal, call) is None:
        return
    targets = groups[0][0].spec["targets"]
    placed = Placed({"name": name, "kind": "lora", "targets": targets, "rank": rank, "alpha": float(rank)}, {})
    for host in groups[0][0].hosts:
        adapter = walk.model.get_submodule(f"{host}.peft.{name}")
        placed.hosts[host] = {key: t.detach().clone() for key, t in adapter.state_dict().items()}
    stacks = [state.oracle(g).placed for g in groups]
    for host, tensors in placed.hosts.items() if exact else ():
        wanted = sum(
            w * DELTAS[kind](p, s) for w, stack in zip(weights, stacks, strict=True) for kind, p, s in stack[host]
        )
        close(DELTAS["lora"](tensors, placed.spec), wanted, f"{name} at {host}", torch.float32)
    state.methods.append(placed)


def quantize(walk):
    """Adapters are there, so that it is refused; see the walks over quantized networks."""
    if walk.state.injected:
        walk.attempt(False, lambda: lp.quantize(walk.model, "int8", ["up"]))


def ensemble(walk):
    """There are no prompts of several tasks, so that it is refused."""
    walk.attempt(False, lambda: lp.ensemble(walk.model, x=inputs(walk.net)))


def finalize(walk):
    """Nothing has encoders for training alone, so that nothing changes."""
    before = digest(walk.model)
    if walk.attempt(walk.state.injected, lambda: lp.finalize(walk.model)) is not None:
        require(digest(walk.model) == before, "finalize changed the model")


def draw_edit(rng, walk):
    names = [n for n, t in walk.state.base.items() if not n.endswith(STATISTICS)]
    return rng.choice(names), rng.choice(list(EDITS)), rng.randrange(10**6)


def draw_combine(rng, walk):
    known = walk.state.names() or ["a"]
    names = tuple(rng.sample(known, min(2, len(known))))
    return names, tuple(rng.choice((-1.0, 0.5, 2.0)) for _ in names), rng.choice(("m", "n"))


VALUE_STEPS = {
    "step": (lambda rng, walk: (), train, 12),
    "edit": (draw_edit, edit, 6),
    "cast": (lambda rng, walk: (rng.choice(("float64", "float64", "float32", "bfloat16")),), cast, 4),
    "copy": (lambda rng, walk: (rng.choice(("deepcopy", "pickle")),), copied, 5),
    "train and eval": (lambda rng, walk: (), switch_mode, 2),
    "combine": (draw_combine, combine, 4),
    "quantize": (lambda rng, walk: (), quantize, 1),
    "ensemble": (lambda rng, walk: (), ensemble, 1),
    "finalize": (lambda rng, walk: (), finalize, 1),
}
