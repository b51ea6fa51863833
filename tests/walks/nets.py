"""Small networks for random walks, and what each computes, written down once more for an oracle."""

import torch
import torch.nn.functional as F
from torch import nn

import lightning_peft as lp


class Perceptron(nn.Module):
    """Reads images: a convolution, norms of two kinds, layers with and without bias."""

    def __init__(self):
        super().__init__()
        self.conv, self.batch_norm, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LayerNorm(4)
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        h = self.norm(F.relu(self.batch_norm(self.conv(x))).mean((2, 3)))
        return self.head(h + self.down(F.gelu(self.up(h))))


def perceptron(o, x):
    h = o.layer_norm("norm", F.relu(o.batch_norm("batch_norm", o.convolution("conv", x))).mean((2, 3)))
    return o.linear("head", h + o.linear("down", F.gelu(o.linear("up", h))))


class Encoder(nn.Module):
    """Reads tokens: torch's attention, whose weights are read and never called, and a feed-forward."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(x + self.attn(x, x, x)[0])
        return self.head(x + self.down(F.gelu(self.up(x))))


def encoder(o, ids):
    x = o.embedding("embed", ids)
    x = o.layer_norm("norm", x + o.attention("attn", x))
    return o.linear("head", x + o.linear("down", F.gelu(o.linear("up", x))))


class Tied(nn.Module):
    """Reads tokens; its output layer shares the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.out(x + self.down(F.gelu(self.up(x))))


def tied(o, ids):
    x = o.embedding("embed", ids)
    return o.linear("out", x + o.linear("down", F.gelu(o.linear("up", x))))


NETS = {
    "perceptron": (Perceptron, perceptron),
    "encoder": (Encoder, encoder),
    "tied": (Tied, tied),
    "quantized": (Perceptron, perceptron),
}
QUANTIZED = ["up", "down"]
ALIASES = {"tied": {"out.weight": "embed.weight"}}  # names of shared parameters, by the first name of each
ROWS = 3


def build(kind):
    """Return a network in float64 and evaluation mode, always with the same values."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = NETS[kind][0]().double().eval()
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
        for p in net.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.3)
    return lp.quantize(net, "int8", QUANTIZED).double() if kind == "quantized" else net


def inputs(kind):
    """Return a batch of three rows."""
    generator = torch.Generator().manual_seed(7)
    if kind in ("perceptron", "quantized"):
        return torch.randn(ROWS, 2, 4, 4, generator=generator, dtype=torch.float64)
    return torch.randint(0, 7, (ROWS, 3), generator=generator)
