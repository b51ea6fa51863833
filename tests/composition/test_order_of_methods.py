"""Methods that share one host give one result in any order: live, merged, merged for a while, and row by row."""

import copy
import itertools

import pytest
import torch
from adapter_edits import stir
from models import OneLayer
from torch import nn

import lightning_peft as lp

HERE = {"targets": ["layer"]}
SUMS = {
    "lora": lp.LoRA(name="lora", rank=2, alpha=3, **HERE),
    "pissa": lp.LoRA(name="pissa", rank=2, init="pissa", scaling="rank_stabilized", **HERE),
    "adalora": lp.AdaLoRA(name="adalora", initial_rank=2, target_rank=1, **HERE),
    "fedpara": lp.FedPara(name="fedpara", rank=2, tanh=True, **HERE),
    "pfedpara": lp.FedPara(name="pfedpara", rank=2, personalized=True, **HERE),
    "krona": lp.KronA(name="krona", scale=2, **HERE),
}
SCALES = {
    "outputs": lp.IA3(name="outputs", targets=["layer"], feedforward_targets=[]),
    "inputs": lp.IA3(name="inputs", targets=[], feedforward_targets=["layer"]),
}
BIASES = {
    "bias": lp.BitFit(name="bias", add_missing=True, **HERE),
    "second bias": lp.BitFit(name="second bias", add_missing=True, **HERE),
}
COPIES = {
    "own weight": lp.OwnParameters(name="own weight", targets=["layer.weight"]),
    "own bias": lp.OwnParameters(name="own bias", targets=["layer.bias"]),
}
DORA = {"dora": lp.LoRA(name="dora", rank=2, decompose=True, **HERE)}
METHODS = SUMS | SCALES | BIASES | COPIES | DORA


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 4)


HOSTS = {
    "linear": (lambda: nn.Linear(4, 6), (9, 4), COPIES.keys() | METHODS.keys() - BIASES.keys()),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), (3, 9, 4), METHODS.keys() - {"own bias"}),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5), METHODS.keys() - BIASES.keys()),
    "conv1d of transformers": (conv1d, (2, 3, 4), METHODS.keys() - BIASES.keys()),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (2, 3, 4), SUMS.keys() | DORA | {"outputs"}),
}


SLOW = ("linear", "linear without bias", "conv2d", "conv1d of transformers")
QUICK = [pytest.param(host, marks=pytest.mark.slow) if host in SLOW else host for host in HOSTS]


def rule(names):
    """Whether methods, inner before outer, go together on one host; all others are refused."""
    if "dora" not in names:
        return True
    inside = names[: names.index("dora")]
    return not (SUMS.keys() | {"own weight"}) & set(names) and not SCALES.keys() & set(inside)


def outcome(host, names, seed=0):
    """Return the outputs of all ways to run these methods on one host; None if injection refuses them."""
    make, shape, _ = HOSTS[host]
    torch.manual_seed(seed)
    net, x = OneLayer(make()).double().eval(), torch.randn(shape, dtype=torch.float64)
    methods = [METHODS[name] for name in names]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        lp.inject(net, methods)
    except ValueError:
        assert type(net.layer).__mro__.count(type(make())) == 1
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        return None
    stir(net, seed)
    found = {"with gradients": net(x).detach()}
    with torch.no_grad():
        found["live"] = net(x)
        found["again"] = net(x)
        lp.merge(net, keep=True)
        found["merged for a while"] = net(x)
        lp.unmerge(net)
        found["unmerged"] = net(x)
        found["merged"] = lp.merge(copy.deepcopy(net))(x)
        found["switched"] = switched(make, methods, net, x, seed)
        # A weight that is read is the same for all rows, and so are added biases.
        if host != "attention" and not BIASES.keys() & set(names):
            if len(COPIES.keys() & set(names)) > 1:
                with pytest.raises(TypeError, match="copies of parameters of layer by two methods; use one"):
                    by_rows(make, methods, net, x, seed)
            else:
                found["by rows"] = by_rows(make, methods, net, x, seed)
    return found


def copied(target, source):
    """Give adapters the values of those of the same name in another model."""
    values = {(name, key): adapter for name, _, key, adapter in lp.adapters(source)}
    for name, _, key, adapter in lp.adapters(target):
        if (name, key) in values:
            adapter.load_state_dict(values[name, key].state_dict())


def switched(make, methods, source, x, seed):
    """The output where the methods were added in another order and activated in this one."""
    torch.manual_seed(seed)
    net = OneLayer(make()).double().eval()
    for method in reversed(methods):
        lp.add_adapter(net, method)
    lp.activate(net, *[method.name for method in methods])
    copied(net, source)
    return net(x)


def by_rows(make, methods, source, x, seed):
    torch.manual_seed(seed)
    net = lp.add_adapter(OneLayer(make()).double().eval(), methods)
    group = [methods[0].name, *(f"{methods[0].name}_{number}" for number in range(2, len(methods) + 1))]
    values = {key: adapter for _, _, key, adapter in lp.adapters(source)}
    for _, _, key, adapter in lp.adapters(net):
        adapter.load_state_dict(values[methods[group.index(key)].name].state_dict())
    with lp.row_adapters(net, [methods[0].name] * len(x)):
        return net(x)


def check(host, names):
    found = outcome(host, names)
    assert (found is not None) == rule(names), names
    for way, y in (found or {}).items():
        torch.testing.assert_close(y, found["live"], rtol=1e-10, atol=1e-10, msg=lambda m, w=way: f"{names} {w}: {m}")
    return found is not None


@pytest.mark.parametrize("host", QUICK)
def test_each_ordered_pair_gives_one_result_or_is_refused(host):
    together = [check(host, pair) for pair in itertools.permutations(sorted(HOSTS[host][2]), 2)]
    print(f"{host}: {sum(together)} pairs equal, {len(together) - sum(together)} refused")
    assert sum(together) >= 20


@pytest.mark.parametrize("host", QUICK)
def test_triples_give_one_result_or_are_refused(host):
    triples = list(itertools.permutations(sorted(HOSTS[host][2]), 3))
    together = [check(host, triple) for triple in triples[:: len(triples) // 30]]
    assert sum(together) >= 5


def test_the_refusal_says_which_order_is_right():
    net = OneLayer(nn.Linear(4, 6))
    with pytest.raises(ValueError, match="name the method of LoRAAdapter first"):
        lp.inject(net, [SCALES["outputs"], DORA["dora"]])
    assert type(net.layer) is nn.Linear
    lp.inject(net, [DORA["dora"], SCALES["outputs"]])
    with pytest.raises(ValueError, match="name the method of LoRAAdapter first"):
        lp.activate(net, "outputs", "dora")
    assert lp.active(net) == ("dora", "outputs")
