"""A name that no adapter can have is refused before anything changes, wherever it comes from."""

import pytest
import torch
from torch import nn

import lightning_peft as lp

OF_TORCH = sorted({name for name in dir(nn.ModuleDict()) if not name.startswith("_")})
METHOD = lp.LoRA(targets=["0"], rank=1)


def named(name):
    return lp.LoRA(targets=["0"], rank=1, name=name)


def digest(net):
    state = {name: (id(p), p.requires_grad) for name, p in net.named_parameters()}
    return state, [(type(m), sorted(vars(m)), sorted(m._modules)) for m in net.modules()]


WAYS = {
    "inject": lambda net, name: lp.inject(net, named(name)),
    "inject the second": lambda net, name: lp.inject(net, [METHOD, named(name)]),
    "add": lambda net, name: lp.add_adapter(net, named(name)),
    "add under the name": lambda net, name: lp.add_adapter(net, METHOD, name),
    "own parameters": lambda net, name: lp.inject(net, lp.OwnParameters(targets=["0"], name=name)),
    "prefixes": lambda net, name: lp.add_adapter(net, [METHOD, lp.BitFit()], name, also_train=["1"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_names_that_torch_uses_are_refused_and_nothing_changes(way):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = digest(net)
    assert "training" in OF_TORCH
    names = [*OF_TORCH, "a.b", ".", "_x", "__class__"]
    for name in names if "name" in way or way == "prefixes" else [*names, ""]:  # there, "" means the method's name
        with pytest.raises(ValueError, match="A method cannot be named"):
            WAYS[way](net, name)
        assert digest(net) == before, name


@pytest.mark.parametrize("name", [5, ("a",), True])
def test_names_that_are_no_strings_are_refused_and_nothing_changes(name):
    net = nn.Sequential(nn.Linear(2, 2))
    before = digest(net)
    with pytest.raises(TypeError, match="name is a string"):
        lp.inject(net, named(name))
    assert digest(net) == before


@pytest.mark.parametrize("name", ["peft", "lora own", "0", "weight", "own", "Täglich", "query", "a/b", "x_query"])
def test_other_names_serve_from_injection_to_a_file_and_back(name, tmp_path):
    net = lp.inject(nn.Sequential(nn.Linear(2, 2)), named(name))
    ((*_, adapter),) = lp.adapters(net)
    nn.init.ones_(adapter.b)
    lp.save_adapter(net, tmp_path / "folder")
    fresh = nn.Sequential(nn.Linear(2, 2))
    fresh.load_state_dict({k: v for k, v in net.state_dict().items() if ".peft." not in k})
    assert lp.active(lp.load_adapter(fresh, tmp_path / "folder")) == (name,)
    assert torch.equal(fresh(torch.ones(1, 2)), net(torch.ones(1, 2)))
