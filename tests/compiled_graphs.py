"""What ``torch.compile`` made of a model: its graphs, what they are given in each call, and what a call changes."""

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop
from torch.fx.experimental.proxy_tensor import py_sym_types

# Operators that wait for a value, that copy a number of Python to the device, or that write to what a graph is given.
FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "lift_fresh_copy", "copy_", "set_", "nonzero")


class GraphRecorder:
    """Backend of ``torch.compile`` that runs operators as they are, forward and backward, and records its graphs."""

    def __init__(self):
        self.count = 0  # of graphs that Dynamo made; a graph with gradients has two of ATen operators
        self.operators, self.constants, self.devices = set(), [], set()
        self.calls = []  # the tensors and numbers that each call of a graph was given
        self.written = []  # positions of tensors that a call wrote to

    def __call__(self, graph, inputs):
        self.count += 1
        run = aot_autograd(fw_compiler=self._record, bw_compiler=self._record)(graph, inputs)

        def call(*values):
            tensors = [value for value in values if isinstance(value, torch.Tensor)]
            before = [tensor._version for tensor in tensors]
            output = run(*values)
            self.calls.append(values)
            self.written += [i for i, tensor in enumerate(tensors) if tensor._version != before[i]]
            return output

        return call

    def _record(self, graph, inputs):
        for node in graph.graph.nodes:
            if node.op == "call_function":
                self.operators.add(str(node.target))
            if node.op == "get_attr":
                self.constants.append(node.target)
            value = node.meta.get("val")
            self.devices |= {str(value.device)} if isinstance(value, torch.Tensor) else set()
        return nop(graph, inputs)

    def forbidden_operators(self):
        """Return the operators that make a device wait, or a graph unfit for being replayed."""
        return {name for name in self.operators if any(f".{short}." in f".{name}." for short in FORBIDDEN)}

    def given_beside(self, model, *batches):
        """Return what calls were given that is neither of the model, nor of the batches, nor the length of one."""
        known = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        known |= {id(tensor) for batch in batches for tensor in batch.values()}
        sizes = {size for batch in batches for tensor in batch.values() for size in tensor.shape}
        values = [value for call in self.calls for value in call if not isinstance(value, py_sym_types)]
        return [value for value in values if id(value) not in known and not (type(value) is int and value in sizes)]


def attributes(model):
    """Return the attributes of every module, by its name, and the active set of this thread where a host has one."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            found |= {(name, key, part): each for part, each in parts}
        if (local := vars(module).get("peft_local")) is not None:
            found[name, "active", ""] = local.get()
    return found


def changed(before, after):
    """Return the names of attributes that are not the objects that they were."""
    return sorted(map(str, {key for key in before | after if before.get(key) is not after.get(key)}))
