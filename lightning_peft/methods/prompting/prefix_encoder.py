"""``PrefixEncoder``: the part of a reparameterization that all prefixes of a model share, computed once per call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Call, parameter_like
from ...core.scoped import Scoped
from ...ops.kept_result import KeptResult

UNMERGEABLE = "no weight gives keys and values that do not depend on the input"


class PrefixEncoder(nn.Module):
    """tanh(E W^T + b) of shape (length, hidden): the part of a reparameterization that all prefixes share.

    Args:
        like: Tensor whose device, and type if it is wider than float32, the parameters have.
        length: Number of rows of E.
        features: Width of E.
        hidden: Width of the result.
    """

    def __init__(self, like: Tensor, length: int, features: int, hidden: int) -> None:
        super().__init__()
        self.embedding = parameter_like(like, length, features)
        self.linear = linear_like(like, features, hidden)
        self.kept = KeptResult()
        self.of_call = Scoped[_Hidden]()  # during the call of the model

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding)
        self.linear.reset_parameters()

    def forward(self) -> Tensor:
        with own_types(self.embedding):
            return torch.tanh(self.linear(self.embedding))

    def evaluated(self) -> Tensor:
        """Return the result; in evaluation it may be an earlier one, so nobody writes to it."""
        if torch.is_grad_enabled():
            return self.forward()
        return self.kept.get((), (self.embedding, self.linear.weight, self.linear.bias), self.forward)

    def for_prefix(self, prefix: nn.Module) -> Tensor:
        """Return the result for one prefix: that of the call of the model which is under way, or of evaluation."""
        shared = None if torch.compiler.is_dynamo_compiling() else self.of_call.get()
        value = None if shared is None else shared.for_prefix(prefix)
        return self.evaluated() if value is None else value


class _Hidden:
    """Result of the encoder for all prefixes of one call of a model.

    Reentrant checkpointing calls a part without gradients first. When backward calls it again, that part has a backward
    pass of its own, which the graph of the encoder, shared with other parts, would not survive.

    Args:
        value: The result.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.without_gradient = set[nn.Module]()  # prefixes

    def for_prefix(self, prefix: nn.Module) -> Tensor | None:
        """Return the result; None for a prefix that has to compute its own."""
        if not self.value.requires_grad:
            return None if torch.is_grad_enabled() else self.value
        if not torch.is_grad_enabled():
            self.without_gradient.add(prefix)
        elif prefix in self.without_gradient:
            return None
        return self.value


class SharedEncoder(Adapter):
    """Holds the encoder that prefixes share, on a module around all of their hosts, and runs it once in each call.

    There, FSDP keeps the encoder's parameters gathered during the calls of all hosts.
    """

    part, unmergeable = "encoder", UNMERGEABLE

    def __init__(self, encoder: PrefixEncoder) -> None:
        super().__init__()
        self.encoder: PrefixEncoder | None = encoder
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.encoder is not None:
            self.encoder.reset_parameters()

    def export_state(self) -> dict[str, Tensor]:
        return {}

    def finalize(self) -> None:
        self.encoder = None

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        encoder = self.encoder
        if encoder is None or torch.compiler.is_dynamo_compiling():  # the compiler finds what is computed twice
            return inner(*args, **kwargs)
        with encoder.of_call.during(_Hidden(encoder.evaluated())):
            return inner(*args, **kwargs)


def linear_like(like: Tensor, features: int, out: int) -> nn.Linear:
    """Return a layer whose device, and type if it is wider than float32, are those of a tensor."""
    return nn.Linear(features, out, device=like.device, dtype=parameter_like(like).dtype)


def own_types(weight: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast, so that an encoder computes what its finalized adapter holds."""
    device = "cpu" if weight.is_meta else weight.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
