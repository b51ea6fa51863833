"""Steps that write adapters into folders and read them again, here or into a fresh model; folders of HF PEFT, too."""

import copy

import torch
from safetensors.torch import load_file

import lightning_peft as lp
from lightning_peft.core.injection_record import get_record
from walks.checks import dtype_of, require
from walks.methods import matching
from walks.nets import build
from walks.state import Placed, nothing_is_merged, together
from walks.steps_adapters import free_name, known_copies, names_are_free, shared

PACKED = {"kept", "mean", "spread"}  # what only further training of AdaLoRA needs


def save(walk, name, number):
    state = walk.state
    legal = state.injected and (name is None or (name in state.names() and not state.trained))
    folder = walk.folder / f"saved-{number}"
    if walk.attempt(legal, lambda: lp.save_adapter(walk.model, folder, name)) is None:
        return
    kept = state.copy()
    if name is not None:
        kept.methods = kept.members(name)
        kept.groups, kept.active = {}, [placed.name for placed in kept.methods]
    kept.merged = False
    require_file(folder, kept)
    chosen = {placed.name for placed in kept.methods}
    walk.saved[number] = kept, [method for method in get_record(walk.model).methods if method.name in chosen]


def require_file(folder, kept):
    """The file holds what the state does, and nothing else."""
    expected = {
        f"{host}.peft.{placed.name}.{key}": value
        for placed in kept.methods
        for host, tensors in placed.hosts.items()
        for key, value in tensors.items()
        if key not in PACKED
    } | trained_values(kept)
    found = load_file(folder / "adapter_model.safetensors")
    require(found.keys() == expected.keys(), lambda: f"the file's keys differ: {sorted(found.keys() ^ expected)}")
    require(all(torch.equal(found[k], v.contiguous()) for k, v in expected.items()), "values in the file differ")


def trained_values(state):
    """What trains in the base, and the statistics of norms that train."""
    owners = {name.rpartition(".")[0] for name in state.trained}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    moved = {n for n in state.base if n.endswith(statistics) and n.rpartition(".")[0] in owners}
    return {name: state.base[name] for name in state.trained | moved}


def in_new_types(placed, state):
    """Give the tensors of methods the types that adapters created on a state's base have."""
    for p in placed:
        for host, tensors in p.hosts.items():
            base = torch.float32 if host in state.quantized() and p.spec["kind"] != "own" else dtype_of(state)
            for key, t in tensors.items():
                wide = base if key.startswith("own.running") else torch.promote_types(base, torch.float32)
                tensors[key] = t.to(wide) if t.is_floating_point() else t


def rebuild(state):
    """Return a fresh model with the base of a state."""
    model = build(state.net)
    if state.net == "quantized" and not state.quantized():
        lp.dequantize(model)
    model.to(dtype_of(state))
    shown = model.state_dict()
    for name, value in state.base.items():
        owner, _, key = name.rpartition(".")
        if name not in shown:  # a bias that was merged
            model.get_submodule(owner).register_parameter(key, torch.nn.Parameter(value.clone()))
        else:
            shown[name].copy_(value)
    for name, p in model.named_parameters():
        p.requires_grad_(state.required[name])
    return model


def load_fresh(walk, number):
    """Load a folder into a fresh model with the base of then, and go on with that."""
    if number not in walk.saved:
        return
    kept, _ = walk.saved[number]
    walk.model, walk.state = rebuild(kept), kept.copy()
    walk.state.clear()
    folder = walk.folder / f"saved-{number}"
    if walk.attempt(True, lambda: lp.load_adapter(walk.model, folder)) is not None:
        walk.state = kept.copy()
        in_new_types(walk.state.methods, walk.state)


def load_here(walk, number):
    """Load a folder into the model at hand, which has the same methods, others, or none."""
    state = walk.state
    if number not in walk.saved:
        return
    kept, methods = walk.saved[number]
    if state.base.keys() != kept.base.keys() or state.base["up.weight"].dtype != kept.base["up.weight"].dtype:
        return
    record = get_record(walk.model)
    legal = None if nothing_is_merged(state) else not state.merged
    if record is not None:
        same = record.methods == methods and [list(p.hosts) for p in state.methods] == [
            list(p.hosts) for p in kept.methods
        ]
        legal = legal and same and state.trained == kept.trained
    folder = walk.folder / f"saved-{number}"
    if walk.attempt(legal, lambda: lp.load_adapter(walk.model, folder, strict=False)) is None:
        return
    values = copy.deepcopy(kept.methods)
    if record is None:
        in_new_types(values, state)
        state.methods, state.groups, state.active = values, dict(kept.groups), list(kept.active)
        state.trained, state.injected = set(kept.trained), True
    else:
        for placed, loaded in zip(state.methods, values, strict=True):
            for host, tensors in placed.hosts.items():
                tensors.update({key: t.to(tensors[key].dtype) for key, t in loaded.hosts[host].items()})
    state.base |= {name: value.clone() for name, value in trained_values(kept).items()}


def add_folder(walk, number, name):
    """Add a folder's adapters under another name; what it trained in the base becomes copies."""
    state = walk.state
    if number not in walk.saved or state.base.keys() != walk.saved[number][0].base.keys():
        return
    kept = walk.saved[number][0].copy()
    methods = bool(kept.methods)  # of a head alone, there is nothing to add
    if state.base["up.weight"].dtype != kept.base["up.weight"].dtype:
        return
    placed = kept.methods
    for index, p in enumerate(placed):
        p.spec = {**p.spec, "name": name if index == 0 else f"{name}_{index + 1}"}
    if kept.trained:
        placed = [*placed, copies_of_trained(kept, name)]
    known_copies(placed, state)
    legal = not state.merged and methods and names_are_free(state, placed) and not shared(state, placed)
    legal = legal and together([p for p in placed if p.hosts])
    of_methods = {n for p in kept.methods if p.spec["kind"] == "bitfit" for n in matching(p.spec["targets"], kept.base)}
    if legal and (
        kept.trained & {n for p in kept.methods for n in p.replaced()}
        or not kept.trained.issuperset(n for n in of_methods if "bias" in n)
    ):
        legal = None  # biases that a method trains while another has copies of them
    folder = walk.folder / f"saved-{number}"
    if walk.attempt(legal, lambda: lp.add_adapter(walk.model, folder, name, strict=False)) is None:
        return
    in_new_types(placed, state)
    state.injected = True
    state.methods += placed
    if len(placed) > 1:
        state.groups[name] = [p.name for p in placed]


def copies_of_trained(kept, name):
    hosts = {}
    for key, value in trained_values(kept).items():
        host, _, entry = key.rpartition(".")
        hosts.setdefault(host, {})[f"own.{entry}"] = value.clone()
    spec = {"name": f"{name}_own", "kind": "own", "targets": tuple(sorted(kept.trained))}
    return Placed(
        spec, {host: hosts[host] for host in dict.fromkeys(n.rpartition(".")[0] for n in kept.base) if host in hosts}
    )


def draw_save(rng, walk):
    return rng.choice([None, *walk.state.names()]), len(walk.saved)


def draw_number(rng, walk):
    return (rng.choice(list(walk.saved)),) if walk.saved else None


def draw_number_and_name(rng, walk):
    return (rng.choice(list(walk.saved)), free_name(rng, walk)) if walk.saved else None


FILE_STEPS = {
    "save_adapter": (draw_save, save, 8),
    "load_adapter, fresh": (draw_number, load_fresh, 16),
    "load_adapter": (draw_number, load_here, 12),
    "add_adapter, folder": (draw_number_and_name, add_folder, 16),
}
