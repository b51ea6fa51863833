"""A module that is called like a role, and is not what the role means, is what a pattern means; doubt is an error."""

import pytest
from models import MODELS
from torch import nn

import lightning_peft as lp


class Net(nn.Module):
    """Its output layer is not the one that is called ``head``."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.big = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, x):
        return self.big(self.head(self.body(x)))


class Module(nn.Module):
    def __init__(self, **nets):
        super().__init__()
        self.nets = nn.ModuleDict(nets)

    def forward(self, x):
        return [net(x) for net in self.nets.values()]


LORA = lp.LoRA(targets=["body"], rank=2)


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and ".peft." not in name]


@pytest.mark.parametrize("make", [Net, lambda: Module(net=Net())], ids=["alone", "in a module"])
def test_what_is_called_head_trains_and_not_the_last_layer(make):
    model = lp.inject(make(), LORA, also_train=["head"])
    assert [name.removeprefix("nets.net.") for name in trained(model)] == ["head.weight", "head.bias"]


def test_a_layer_that_is_called_like_a_role_is_adapted():
    model = lp.inject(Net(), lp.LoRA(targets=["head"], rank=2))
    assert [name for name, *_ in lp.adapters(model)] == ["head"]


def test_copies_and_biases_follow_the_same_rule():
    model = lp.inject(Net(), [lp.OwnParameters(targets=["head"]), lp.BitFit(targets=["head"], name="biases")])
    assert [name for name, *_ in lp.adapters(model)] == ["head"]


def test_a_parameter_that_is_called_like_a_role_is_what_trains():
    model = Net()
    model.body.output = nn.Parameter(model.body.weight.detach().clone())
    assert trained(lp.inject(model, LORA, also_train=["output"])) == ["body.output"]


def test_several_that_are_called_so_are_refused_before_anything_changes():
    model = Module(one=Net(), two=Net())
    model.last = nn.Linear(9, 2)
    with pytest.raises(ValueError, match=r"'head' is unclear: nets.one.head, nets.two.head .* it means .*last"):
        lp.inject(model, LORA, also_train=["head"])
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == []
    assert trained(lp.inject(model, LORA, also_train=["one.head"])) == ["nets.one.head.weight", "nets.one.head.bias"]


def test_roles_that_nothing_else_is_called_by_mean_what_they_did():
    bert = MODELS["bert"]()
    assert trained(lp.inject(bert, lp.LoRA(rank=2), also_train=["head"])) == ["classifier.weight", "classifier.bias"]
    model = lp.inject(MODELS["bert"](), lp.OutputLayers())  # whose blocks have modules called output
    assert trained(model)[-1] == "classifier.bias"
    with pytest.raises(ValueError, match="'output' is unclear"):
        lp.inject(MODELS["bert"](), lp.LoRA(rank=2), also_train=["output"])
