"""``State``: what a model must hold after a walk's steps, as plain tensors and names."""

import copy
from dataclasses import dataclass, field

import torch

from walks.methods import DELTAS, SCALES, matching
from walks.nets import ALIASES, NETS, inputs
from walks.oracle import Oracle, effective


@dataclass
class Placed:
    """A method in the model: its description, and for each host the tensors of its adapter."""

    spec: dict
    hosts: dict[str, dict[str, torch.Tensor]]

    @property
    def name(self):
        return self.spec["name"]

    def tensors(self, host):
        """The tensors that it uses at a host, where tied layers share rows."""
        return self.hosts["embed" if self.spec["kind"] == "tokens" else host]

    def replaced(self):
        """The names of base parameters in whose place its tensors are."""
        own = [(host, key[4:]) for host, tensors in self.hosts.items() for key in tensors if key.startswith("own.")]
        return {f"{host}.{key}" for host, key in own if not key.startswith(("running", "num"))}


@dataclass
class State:
    net: str
    base: dict[str, torch.Tensor]
    required: dict[str, bool]  # requires_grad before the first injection
    methods: list[Placed] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    injected: bool = False
    merged: bool = False

    def copy(self):
        return copy.deepcopy(self)

    def names(self):
        """The names that ``activate`` takes."""
        members = {name for names in self.groups.values() for name in names[1:]}
        return [placed.name for placed in self.methods if placed.name not in members]

    def members(self, name):
        return [placed for placed in self.methods if placed.name in self.groups.get(name, [name])]

    def active_methods(self):
        return [placed for name in self.active for placed in self.members(name)]

    def inactive_methods(self):
        active = {placed.name for placed in self.active_methods()}
        return [placed for placed in self.methods if placed.name not in active and placed.hosts]

    def clear(self):
        """Forget all adapters."""
        self.methods, self.groups, self.active, self.trained, self.injected = [], {}, [], set(), False

    def value(self, name):
        """A tensor of the base in float64; of a weight in 8 bits, what its codes mean."""
        tensor = self.base[name]
        if tensor.dtype == torch.int8:
            tensor = tensor * self.base[name.replace("weight", "scale")]
        return tensor.double() if tensor.is_floating_point() else tensor

    def quantized(self):
        """The layers that are stored in few bits."""
        return {name.rpartition(".")[0] for name, tensor in self.base.items() if tensor.dtype == torch.int8}

    def trained_alone(self, placed):
        """The parameters of the base that a method trains."""
        biases = [name for name in matching(placed.spec["targets"], self.base) if "bias" in name]
        return set(biases) & self.trained if placed.spec["kind"] in ("bitfit", "bias") else set()

    def oracle(self, methods=None):
        """An oracle for methods, inner before outer; for the active ones if not given."""
        stacks = stacked(self.active_methods() if methods is None else methods)
        wide = {name: self.value(name) for name in self.base}
        placed = {
            host: [(p.spec["kind"], {k: t.double() for k, t in p.tensors(host).items()}, p.spec) for p in stack]
            for host, stack in stacks.items()
        }
        return Oracle(wide | {a: wide[name] for a, name in ALIASES.get(self.net, {}).items()}, placed)

    def output(self, methods=None, x=None):
        x = inputs(self.net) if x is None else x
        return NETS[self.net][1](self.oracle(methods), x)

    def merged_base(self):
        """The base's tensors with the active adapters in them, and the names of those that changed."""
        oracle, new = self.oracle(), {}
        for host, stack in oracle.placed.items():
            if host == "out":
                continue  # shares its weight with the embedding
            prefix = "in_proj_" if host == "attn" else ""
            for kind, tensors, _ in stack:
                if kind == "own":
                    new |= {f"{host}.{key[4:]}": value for key, value in tensors.items()}
            name, bias_name = f"{host}.{prefix}weight", f"{host}.{prefix}bias"
            if not any(kind != "own" for kind, *_ in stack):
                continue
            weight, bias = oracle.tensor(host, f"{prefix}weight"), oracle.tensor(host, f"{prefix}bias")
            matrix = weight.T if host == "embed" else weight.flatten(1)
            none = bias is None
            bias = matrix.new_zeros(len(matrix)) if none else bias
            for entry in stack:
                matrix, bias = effective(matrix, bias, [entry], host == "embed")
                bias = bias + entry[1]["bias"] if entry[0] == "bias" else bias
            new[name] = matrix.T if host == "embed" else matrix.view_as(weight)
            if not none or any(kind == "bias" for kind, *_ in stack):
                new[bias_name] = bias
        return new


def stacked(methods):
    """Return for each host its methods, inner before outer."""
    stacks = {}
    for placed in methods:
        for host in placed.hosts:
            stacks.setdefault(host, []).append(placed)
    return stacks


def together(methods):
    """Return whether methods, inner before outer, may be active at once; None where either will do."""
    outcome = True
    for host, stack in stacked(methods).items():
        kinds = [placed.spec["kind"] for placed in stack]
        copies = [name for placed in stack for name in placed.replaced() if name.rpartition(".")[0] == host]
        if len(set(copies)) < len(copies):
            return False
        if whole := [kind for kind in kinds if kind in ("dora", "tokens")]:
            sums = set(DELTAS) & set(kinds) or len(whole) > 1 or f"{host}.weight" in copies
            if sums or set(SCALES) & set(kinds[: kinds.index(whole[0])]):
                return False
            outcome = None if f"{host}.in_proj_weight" in copies else outcome
    return outcome


def nothing_is_merged(state):
    """Whether there was no active adapter to merge, so that what a merge forbids may be refused or not."""
    return state.merged and not any(placed.hosts for placed in state.active_methods())
