"""Methods that random walks draw: plain descriptions, the methods that they stand for, and where these can go."""

import lightning_peft as lp

DELTAS = ("lora", "rslora", "pissa", "adalora", "fedpara", "tanh", "pfedpara", "krona")
SCALES = ("outputs", "inputs")
LINEAR = (*DELTAS, "dora", *SCALES, "bottleneck")
# What fits each host of each network. Biases are added to layers without one, and copies are made of parameters.
HOSTS = {
    "perceptron": {
        "conv": (*DELTAS, "dora", *SCALES),
        "up": LINEAR,
        "down": (*LINEAR, "bias"),
        "head": LINEAR,
    },
    "encoder": {
        "embed": (*DELTAS, "dora", "tokens", "tokens"),
        "attn": LINEAR,
        "attn.out_proj": (*DELTAS, "dora", "outputs"),
        "up": LINEAR,
        "down": LINEAR,
    },
    "tied": {"embed": (*DELTAS, "dora", "tokens", "tokens"), "up": LINEAR, "down": LINEAR, "out": (*LINEAR, "bias")},
}
HOSTS["quantized"] = HOSTS["perceptron"]
PARAMETERS = {  # patterns of what trains, in the base or as copies
    "perceptron": ("head", "norm", "up.bias", "batch_norm", "conv"),
    "encoder": ("head", "norm", "down", "attn.in_proj_weight", "embed"),
    "tied": ("up", "down.bias", "down"),
}
PARAMETERS["quantized"] = PARAMETERS["perceptron"]
BIASED = {
    **dict.fromkeys(("perceptron", "quantized"), ("up", "head", "conv")),
    "encoder": ("down", "head", "norm"),
    "tied": ("up", "down"),
}
TOKENS = (1, 4)  # rows of embeddings that train
STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "scale")  # ends of names of buffers


def make(spec):
    """Return the method that a description stands for."""
    name, kind, targets = spec["name"], spec["kind"], list(spec["targets"])
    common = {"name": name, "targets": targets}
    if kind in ("lora", "rslora", "pissa", "dora"):
        scaling = "rank_stabilized" if kind == "rslora" else "standard"
        init = "pissa" if kind == "pissa" else "kaiming"
        sizes = {"rank": spec["rank"], "alpha": spec["alpha"]}
        return lp.LoRA(**common, **sizes, scaling=scaling, init=init, decompose=kind == "dora")
    if kind == "adalora":
        return lp.AdaLoRA(**common, initial_rank=spec["rank"], target_rank=1, alpha=spec["alpha"])
    if kind in ("fedpara", "tanh", "pfedpara"):
        return lp.FedPara(**common, rank=spec["rank"], tanh=kind == "tanh", personalized=kind == "pfedpara")
    if kind == "krona":
        return lp.KronA(**common, scale=spec["scale"])
    if kind == "outputs":
        return lp.IA3(**common, feedforward_targets=[])
    if kind == "inputs":
        return lp.IA3(name=name, targets=[], feedforward_targets=targets)
    if kind == "bottleneck":
        return lp.Bottleneck(**common, size=2, train_norms=False, train_head=False)
    if kind == "own":
        return lp.OwnParameters(**common)
    if kind == "tokens":
        return lp.TrainableTokens(**common, tokens=list(TOKENS))
    return lp.BitFit(**common, add_missing=kind == "bias")


def draw(rng, net, name):
    """Return a random description of a method for a network."""
    hosts = HOSTS[net]
    if (chance := rng.random()) < 0.12:
        return {"name": name, "kind": "own", "targets": (rng.choice(PARAMETERS[net]),)}
    if chance < 0.2:
        return {"name": name, "kind": "bitfit", "targets": (rng.choice(BIASED[net]),)}
    host = rng.choice(list(hosts))
    kind = rng.choice(hosts[host])
    fitting = [other for other in hosts if kind in hosts[other] and other != host]
    targets = (host, *rng.sample(fitting, rng.randint(0, min(1, len(fitting)))))
    targets = ("embed",) if kind == "tokens" else targets
    sizes = {"rank": rng.randint(1, 2), "alpha": float(rng.randint(1, 4)), "scale": rng.choice((0.5, 2.0))}
    sizes |= {"tokens": TOKENS} if kind == "tokens" else {}
    return {"name": name, "kind": kind, "targets": tuple(sorted(targets)), **sizes}


TENSORS = {
    **dict.fromkeys(("lora", "rslora"), {"a", "b"}),
    "pissa": {"a", "b", "a0", "b0"},
    "dora": {"a", "b", "magnitude"},
    "adalora": {"a", "b", "e", "kept", "mean", "spread"},
    **dict.fromkeys(("fedpara", "tanh", "pfedpara"), {"x1", "y1", "x2", "y2"}),
    "krona": {"a", "b"},
    **dict.fromkeys(SCALES, {"scales"}),
    "bias": {"bias"},
    "tokens": {"weight"},
    "bottleneck": {"down", "down_bias", "up", "up_bias"},
}
FIXED = {"a0", "b0", "kept", "mean", "spread"}  # buffers


def tensor_names(spec, host, base):
    """Return the names of the tensors that the adapter of a method on a host has."""
    if spec["kind"] == "own":
        owned = {f"own.{name.rpartition('.')[2]}" for name in matching(spec["targets"], base, host)}
        buffers = {"own.running_mean", "own.running_var", "own.num_batches_tracked"}
        return owned | (buffers if f"{host}.running_mean" in base else set())
    if spec["kind"] == "tokens" and host == "out":
        return set()  # the embedding has the rows that both use
    cores = spec["kind"] in ("fedpara", "tanh", "pfedpara") and host == "conv"
    return TENSORS[spec["kind"]] | ({"t1", "t2"} if cores else set())


def matching(patterns, base, host=None):
    """Return the names of parameters of the base that patterns mean, all or those of one host."""
    names = [name for name in base if not name.endswith(STATISTICS)]
    found = [n for n in names if any(n == p or n.startswith(f"{p}.") for p in patterns)]
    return [n for n in found if host is None or n.rpartition(".")[0] == host]
