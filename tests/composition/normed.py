"""A model with a named adapter that has a norm, its statistics and a head of its own."""

import torch
from adapter_edits import stir
from torch import nn

import lightning_peft as lp


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.head(self.norm(self.first(x)))


def normed(scale=1.0):
    """A model with a named adapter that has a norm, its statistics and a head of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Normed().eval()
    lp.add_adapter(net, lp.LoRA(rank=2, targets=["first"]), "task", also_train=["norm", "head"])
    lp.activate(net, "task")
    stir(net, 0)
    for *_, adapter in lp.adapters(net):
        for buffer in adapter.buffers():
            buffer.add_(scale) if buffer.is_floating_point() else buffer.add_(7)
    return net
