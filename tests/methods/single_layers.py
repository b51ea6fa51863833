"""Networks of one layer of each kind, and the one adapter in them."""

import importlib.util

import pytest
import torch
from torch import nn

import lightning_peft as lp


def only(model):
    ((_, host, _, adapter),) = lp.adapters(model)
    return host, adapter


def fill(model):
    torch.manual_seed(5)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(10, 6)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), (4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 10, bias=False), (2, 3, 6)),
    "transformers conv1d": (conv1d, (4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 9)),
    "conv2d strided": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 7, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 10, 3, groups=2), (2, 6, 7, 7)),
    "conv2d dilated, reflecting": (
        lambda: nn.Conv2d(6, 10, 3, dilation=2, padding=2, padding_mode="reflect"),
        (2, 6, 7, 7),
    ),
    "conv3d": (lambda: nn.Conv3d(6, 10, 2), (2, 6, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), None),
}


needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
