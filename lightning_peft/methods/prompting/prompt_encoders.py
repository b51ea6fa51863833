"""``MLP`` and ``LSTMThenMLP``: encoders of virtual tokens, which only training needs."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import parameter_like


class Encoder(nn.Module, ABC):
    """Maps vectors (tokens, features) to virtual tokens of the same shape."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new weights."""

    @abstractmethod
    def forward(self, x: Tensor, train: bool) -> Tensor:
        """Return virtual tokens; ``train`` tells whether dropout is applied."""


class MLP(Encoder):
    """Computes W_2 relu(W_1 x + b_1) + b_2.

    Args:
        weight: Tensor that the parameters have the device and type of.
        widths: Numbers of features of the input, of the hidden layer and of the output.
    """

    def __init__(self, weight: Tensor, *widths: int) -> None:
        super().__init__()
        like = parameter_like(weight, 0)
        self.up, self.down = (
            nn.Linear(before, after, device=like.device, dtype=like.dtype)
            for before, after in itertools.pairwise(widths)
        )

    def reset_parameters(self) -> None:
        self.up.reset_parameters()
        self.down.reset_parameters()

    def forward(self, x: Tensor, train: bool) -> Tensor:
        y: Tensor = self.down(F.relu(self.up(x)))
        return y


class LSTMThenMLP(Encoder):
    """MLP(BiLSTM(x)), with ``hidden`` features in between.

    Args:
        weight: Tensor that the parameters have the device and type of.
        features: Number of features of input and output.
        hidden: Number of features of the LSTM's output, half of them from each direction.
        dropout: Probability with which features between the layers of the LSTM are dropped in training.
    """

    def __init__(self, weight: Tensor, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.lstm, self.mlp = BiLSTM(weight, features, hidden, dropout), MLP(weight, hidden, features, features)

    def reset_parameters(self) -> None:
        self.lstm.reset_parameters()
        self.mlp.reset_parameters()

    def forward(self, x: Tensor, train: bool) -> Tensor:
        y: Tensor = self.mlp(self.lstm(x, train), train)
        return y


class BiLSTM(nn.Module):
    """Two bidirectional layers, computed as by ``nn.LSTM``, which ``torch.compile`` does not support.

    Args:
        weight: Tensor that the parameters have the device and type of.
        features: Number of features of the input.
        hidden: Number of features of the output, half of them from each direction.
        dropout: Probability with which features between the layers are dropped in training.
    """

    layers = 2

    def __init__(self, weight: Tensor, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.size, self.dropout = hidden // 2, dropout
        for layer, direction in itertools.product(range(self.layers), ("", "_reverse")):
            width = hidden if layer else features
            shapes = {"weight_ih": (4 * self.size, width), "weight_hh": (4 * self.size, self.size)}
            for name, shape in {**shapes, "bias_ih": (4 * self.size,), "bias_hh": (4 * self.size,)}.items():
                self.register_parameter(f"{name}_l{layer}{direction}", parameter_like(weight, *shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(self.size), 1 / math.sqrt(self.size))

    def forward(self, x: Tensor, train: bool) -> Tensor:
        """Return (tokens, hidden) for x (tokens, features)."""
        weights: list[Tensor] = list(self.parameters())
        y = x[None]
        if not (train and self.dropout):
            return self._run(y, weights, self.layers, train)[0]
        # Layer by layer, since what torch compiles for all of them at once leaves out dropout.
        per_layer = len(weights) // self.layers
        for layer in range(self.layers):
            y = F.dropout(y, self.dropout) if layer else y
            y = self._run(y, weights[layer * per_layer : (layer + 1) * per_layer], 1, train)
        return y[0]

    def _run(self, x: Tensor, weights: list[Tensor], layers: int, train: bool) -> Tensor:
        start = x.new_zeros(2 * layers, 1, self.size)
        y: Tensor
        y, _, _ = torch.lstm(x, (start, start), weights, True, layers, 0.0, train, True, True)
        return y
