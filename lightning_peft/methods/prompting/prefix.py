"""``Prefix``: learned keys and values in front of those of an attention call, for all methods with prefixes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Adapter, Call, parameter_like
from ...ops.joined_attention import attend_joined
from ...structure.attention.calls import call_changed
from ...structure.attention.key_value import key_value
from ...structure.attention.probe import probe_attention
from ...structure.layer_of import is_called_linear, layer_of

_UNMERGEABLE = "no weight gives keys and values that do not depend on the input"


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
        self.linear = _linear(like, features, hidden)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding)
        self.linear.reset_parameters()

    def forward(self) -> Tensor:
        return torch.tanh(self.linear(self.embedding))


class SharedEncoder(Adapter):
    """Holds the encoder that prefixes share, on a module around all of their hosts, whose call it does not change.

    There, FSDP keeps the encoder's parameters gathered during the calls of all hosts.
    """

    part, unmergeable = "encoder", _UNMERGEABLE

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
        return inner(*args, **kwargs)


class Prefix(Adapter):
    """Keys and values in front of those that an attention module computes: K' = [P_k; K], V' = [P_v; V].

    P_k and P_v are (length, heads * size), with the number of heads that the module computes keys for, which is read
    from the call. With an encoder, [P_k, P_v] = H W^T + b, where H is shared by all prefixes and W, b are separate.

    Args:
        like: Tensor whose device, and type if it is wider than float32, the parameters have.
        widths: Width of keys and width of values, all heads together.
        length: Number of keys.
        dropout: Probability with which entries of the prefix are dropped in training, separately for each batch row.
        encoder: Module that computes H.
    """

    unmergeable, plot_tensors = _UNMERGEABLE, {"tokens": "key"}

    def __init__(
        self, like: Tensor, widths: tuple[int, int], length: int, dropout: float, encoder: PrefixEncoder | None = None
    ) -> None:
        super().__init__()
        self.widths, self.dropout = widths, dropout
        self.shared = (encoder,)  # in a tuple, so that ``SharedEncoder`` alone registers it
        self.projection = None if encoder is None else _linear(like, encoder.linear.out_features, sum(widths))
        if encoder is None:
            self.key, self.value = (parameter_like(like, length, width) for width in widths)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.projection is not None:
            self.projection.reset_parameters()
            return
        nn.init.normal_(self.key)
        nn.init.normal_(self.value)

    def key_value(self) -> tuple[Tensor, Tensor]:
        """Return P_k and P_v."""
        (encoder,) = self.shared
        if encoder is None or self.projection is None:
            return self.key, self.value
        device = self.projection.weight.device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):  # as the finalized prefix
            key, value = self.projection(encoder()).split(self.widths, -1)
        return key, value

    def export_state(self) -> dict[str, Tensor]:
        return dict(zip(("key", "value"), self.key_value(), strict=True))

    def finalize(self) -> None:
        if self.projection is not None:
            self.key, self.value = (nn.Parameter(x.detach().clone()) for x in self.key_value())
            self.shared, self.projection = (None,), None

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        prefix = self.key_value()

        def prefixed(attend: Call, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Tensor:
            key, value = (self._joined(p, x) for p, x in zip(prefix, (key, value), strict=True))
            return attend_joined(attend, len(prefix[0]), query, key, value, *rest, **settings)

        return call_changed(prefixed, host, inner, *args, **kwargs)

    def _joined(self, prefix: Tensor, x: Tensor) -> Tensor:
        """Return (batch, heads, length + n, size) from P (length, heads * size) and x (batch, heads, n, size)."""
        if x.dim() != 4 or prefix.shape[1] % x.shape[-1] or x.shape[1] % (prefix.shape[1] // x.shape[-1]):
            raise ValueError(
                f"The attention call has keys or values {tuple(x.shape)}, which the prefix {tuple(prefix.shape)} "
                f"does not fit; expected (batch, heads, tokens, size)."
            )
        rows = prefix.to(x.dtype).view(len(prefix), -1, x.shape[-1]).transpose(0, 1).expand(len(x), -1, -1, -1)
        if self.training and self.dropout:
            rows = F.dropout(rows, self.dropout)
        if rows.shape[1] != x.shape[1]:  # the caller repeated grouped heads
            rows = rows.repeat_interleave(x.shape[1] // rows.shape[1], 1)
        return torch.cat([rows, x], -2)


def prefixes(
    model: nn.Module, hosts: Mapping[str, nn.Module], length: int, dropout: float, hidden: int | None
) -> Iterator[tuple[str, Adapter]]:
    """Yield (host's name, prefix) for each attention module and, with a hidden size, first of the shared encoder."""
    encoder = None
    for name, (like, features, widths) in _shapes(model, hosts).items():
        if hidden is not None and encoder is None:
            encoder = PrefixEncoder(like, length, features, hidden)
            yield _called_ancestor(model, list(hosts)), SharedEncoder(encoder)
        yield name, Prefix(like, widths, length, dropout, encoder)


def _shapes(model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, tuple[Tensor, int, tuple[int, int]]]:
    """Return (a weight, width of the input, widths of keys and values) of each attention module.

    They are those of its key and value projections; where these are not known, of its first layer and of the attention
    call in a trace.
    """
    shapes = dict[str, tuple[Tensor, int, tuple[int, int]]]()
    errors = dict[str, Exception]()
    for name, host in hosts.items():
        try:
            project = key_value(model, name)
            shapes[name] = project.weight(host), project.inputs(host)[0], project.outputs(host)
        except (TypeError, ValueError) as exception:
            errors[name] = exception
    widths = probe_attention(model, errors) if errors else {}
    for name, error in errors.items():
        layer = next((m for m in hosts[name].modules() if is_called_linear(m)), None)
        if (found := widths.get(name)) is None or layer is None:
            raise error
        shapes[name] = next(layer.parameters()), layer_of(layer).shape(layer)[1], found
    return {name: shapes[name] for name in hosts}


def _called_ancestor(model: nn.Module, names: list[str]) -> str:
    """Return the name of the innermost module that is called and contains all of these modules."""
    path = ".".join(os.path.commonprefix([name.split(".") for name in names]))
    while path and type(model.get_submodule(path)).forward is nn.Module.forward:
        path = path.rpartition(".")[0]
    return path


def _linear(like: Tensor, features: int, out: int) -> nn.Linear:
    return nn.Linear(features, out, device=like.device, dtype=parameter_like(like).dtype)
