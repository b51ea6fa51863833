"""``Oracle``: the output of a network with adapters, from formulas of papers on plain tensors in float64."""

import math

import torch
import torch.nn.functional as F

# What each kind of method adds to a weight seen as (out, in * kernel), from its tensors p and its settings s.
# LoRA 2106.09685, rsLoRA 2312.03732, PiSSA 2404.02948, AdaLoRA 2303.10512, FedPara 2108.06098, KronA 2212.10650.
DELTAS = {
    "lora": lambda p, s: s["alpha"] / s["rank"] * p["b"] @ p["a"].flatten(1),
    "rslora": lambda p, s: s["alpha"] / math.sqrt(s["rank"]) * p["b"] @ p["a"].flatten(1),
    "pissa": lambda p, s: s["alpha"] / s["rank"] * (p["b"] @ p["a"].flatten(1) - p["b0"] @ p["a0"].flatten(1)),
    "adalora": lambda p, s: s["alpha"] / (s["rank"] + 1e-5) * p["b"] @ torch.diag(p["e"]) @ p["a"].flatten(1),
    "fedpara": lambda p, s: _matrix(p, 1) * _matrix(p, 2),
    "tanh": lambda p, s: _matrix(p, 1).tanh() * _matrix(p, 2).tanh(),
    "pfedpara": lambda p, s: _matrix(p, 1) * (_matrix(p, 2) + 1),
    "krona": lambda p, s: s["scale"] * _kronecker(p["a"], p["b"]),
}


def _matrix(p, number):
    x, y = p[f"x{number}"], p[f"y{number}"]
    if f"t{number}" not in p:
        return x @ y.T
    core = p[f"t{number}"]  # Proposition 3: T x1 X x2 Y
    return torch.stack([x @ place @ y.T for place in core.flatten(2).unbind(2)], 2).flatten(1)


def _kronecker(a, b):
    if b.dim() == 2:
        return torch.kron(a, b).T
    return torch.stack([torch.kron(a, place).T for place in b.flatten(2).unbind(2)], 2).flatten(1)


class Oracle:
    """Values of one forward pass.

    Args:
        base: Tensors of the base by name.
        placed: For each host, inner before outer, (kind, tensors, settings) of its active adapters.
    """

    def __init__(self, base, placed):
        self.base, self.placed = base, placed

    def tensor(self, host, key):
        """A tensor of the base, or the copy of it that an adapter of the host has."""
        for kind, tensors, _ in self.placed.get(host, ()):
            if kind == "own" and f"own.{key}" in tensors:
                return tensors[f"own.{key}"]
        return self.base.get(f"{host}.{key}")

    def linear(self, host, x):
        return self._call(host, x, lambda x, w: x @ w.T)

    def convolution(self, host, x):
        shape = self.base[f"{host}.weight"].shape
        return self._call(host, x, lambda x, w: F.conv2d(x, w.view(shape), padding=1), trailing=(1, 1))

    def embedding(self, host, ids):
        return self._call(host, ids, lambda ids, w: w.T[ids], transposed=True)

    def _call(self, host, x, apply, trailing=(), transposed=False):
        weight, bias = self.tensor(host, "weight"), self.tensor(host, "bias")
        matrix = weight.T if transposed else weight.flatten(1)

        def run(x, adapters):
            if not adapters:
                y = apply(x, matrix)
                return y if bias is None else y + bias.view(-1, *trailing)
            *inner, (kind, p, s) = adapters
            if kind == "inputs":
                return run(x * p["scales"].view(-1, *trailing), inner)
            y = run(x, inner)
            if kind in DELTAS:
                return y + apply(x, DELTAS[kind](p, s))
            if kind in ("dora", "tokens"):
                new, _ = effective(matrix, None, [(kind, p, s)], transposed)
                return y + apply(x, new - matrix)
            if kind == "outputs":
                return y * p["scales"].view(-1, *trailing)
            if kind == "bias":
                return y + p["bias"]
            return bottleneck(y, p) if kind == "bottleneck" else y

        return run(x, self.placed.get(host, []))

    def attention(self, host, x):
        """Self-attention of two heads: adapters change the weight that it reads, in their order."""
        weight, bias = self.tensor(host, "in_proj_weight"), self.tensor(host, "in_proj_bias")
        weight, bias = effective(weight, bias, self.placed.get(host, ()))
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (x @ weight.T + bias).chunk(3, -1))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        out = f"{host}.out_proj"
        weight, bias = effective(self.tensor(out, "weight"), self.tensor(out, "bias"), self.placed.get(out, ()))
        y = (scores @ v).transpose(1, 2).flatten(2) @ weight.T + bias
        for kind, p, _ in self.placed.get(host, ()):
            y = bottleneck(y, p) if kind == "bottleneck" else y
        return y

    def layer_norm(self, host, x):
        return F.layer_norm(x, x.shape[-1:], self.tensor(host, "weight"), self.tensor(host, "bias"))

    def batch_norm(self, host, x):
        mean, variance, weight, bias = (
            self.tensor(host, key).view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def decomposed(matrix, p, s):
    """DoRA, 2402.09353: the norm counts as constant in gradients, by its section 4.3."""
    v = matrix + DELTAS["lora"](p, s)
    return p["magnitude"][:, None] * v / v.detach().square().sum(1, keepdim=True).sqrt()


def effective(weight, bias, adapters, transposed=False):
    """Weight and bias of a linear layer with its adapters, inner before outer; of an embedding, the weight W^T."""
    for kind, p, s in adapters:
        if kind in DELTAS:
            weight = weight + DELTAS[kind](p, s)
        elif kind == "dora":
            weight = decomposed(weight, p, s)
        elif kind == "tokens":
            rows, places = p["weight"], torch.tensor(s["tokens"])
            weight = weight.index_copy(1, places, rows.T) if transposed else weight.index_copy(0, places, rows)
        elif kind == "inputs":
            weight = weight * p["scales"].repeat_interleave(weight.shape[1] // len(p["scales"]))  # of a kernel, too
        elif kind == "outputs":
            weight, bias = weight * p["scales"][:, None], bias * p["scales"]
    return weight, bias


def bottleneck(y, p):
    """Houlsby 1902.00751: y + W_up gelu(W_down y + b_down) + b_up."""
    return y + F.gelu(y @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]
