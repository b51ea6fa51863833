"""``all-linear`` leaves out what a rank exceeds and what is not linear, and says so; what is named is refused."""

import warnings

import pytest
import torch
from torch import nn

import lightning_peft as lp


class Router(nn.Linear):
    """Returns scores and choices, as routers of experts do."""

    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Block(nn.Module):
    def __init__(self, router=False):
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 1)
        self.router = Router(16, 12) if router else None

    def forward(self, x):
        y = self.down(self.up(x).relu()) * self.gate(x).sigmoid()
        return x + (y if self.router is None else y * self.router(x)[0].amax(-1, keepdim=True))


class Net(nn.Module):
    def __init__(self, router=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(router) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


METHODS = {
    "lora": lp.LoRA(rank=4, targets=["all-linear"]),
    "rank pattern": lp.LoRA(rank=2, rank_pattern={"up": 4}, targets=["all-linear"]),
    "adalora": lp.AdaLoRA(initial_rank=4, target_rank=2, targets=["all-linear"]),
}


@pytest.mark.parametrize("name", METHODS)
def test_layers_narrower_than_the_rank_are_left_out_and_said(name):
    with pytest.warns(UserWarning, match=r"leaves out 2 layers with fewer inputs or outputs than .*: blocks.\*.gate"):
        net = lp.inject(Net(), METHODS[name])
    assert [name for name, *_ in lp.adapters(net)] == [f"blocks.{i}.{key}" for i in range(2) for key in ("up", "down")]
    for *_, adapter in lp.adapters(net):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    x = torch.randn(5, 16)
    live = net(x)
    torch.testing.assert_close(lp.merge(net)(x), live, atol=1e-4, rtol=1e-4)


def test_a_rank_that_fits_leaves_nothing_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = lp.inject(Net(), lp.LoRA(rank=1, targets=["all-linear"]))
    assert len(list(lp.adapters(net))) == 6


@pytest.mark.filterwarnings("ignore:all-linear leaves out")
@pytest.mark.parametrize("targets", [["gate"], ["all-linear", "gate"], ["all-linear", "head"]])
def test_a_narrow_layer_that_is_named_is_refused(targets):
    with pytest.raises(ValueError, match="rank at (blocks.0.gate|head) must be at most [13], got 4"):
        lp.inject(Net(), lp.LoRA(rank=4, targets=targets))


def test_a_rank_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"rank at blocks.0.up must be at most 16, got 32"):
        lp.inject(Net(), lp.LoRA(rank=32, targets=["all-linear"]))


def test_a_layer_that_returns_a_tuple_is_left_out_and_said():
    with pytest.warns(UserWarning, match=r"leaves out 2 layers that are not linear: blocks.0.router \(Router\)"):
        net = lp.inject(Net(router=True), lp.LoRA(rank=1, targets=["all-linear"]))
    assert not [name for name, *_ in lp.adapters(net) if "router" in name]
    net(torch.randn(5, 16)).sum().backward()
    with pytest.raises(TypeError, match="Router is a subclass of Linear that returns a tuple"):
        lp.inject(Net(router=True), lp.LoRA(rank=1, targets=["router"]))
