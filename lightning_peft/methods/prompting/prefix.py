"""``Prefix``: learned keys and values in front of those of an attention call, for all methods with prefixes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Adapter, Call, parameter_like
from ...ops.joined_attention import attend_joined
from ...ops.kept_result import KeptResult
from ...ops.kept_rows import KeptRows, Pair
from ...ops.torch_api import is_recorded
from ...structure.attention.calls import call_changed
from ...structure.attention.hosts import asks_interface
from ...structure.attention.key_value import key_value
from ...structure.attention.probe import probe_attention
from ...structure.layer_of import is_called_linear, layer_of
from .prefix_encoder import UNMERGEABLE, PrefixEncoder, SharedEncoder, linear_like, own_types


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
        by_interface: Whether the module reaches attention through transformers' interface alone.
    """

    unmergeable, plot_tensors = UNMERGEABLE, {"tokens": "key"}

    def __init__(
        self,
        like: Tensor,
        widths: tuple[int, int],
        length: int,
        dropout: float,
        encoder: PrefixEncoder | None = None,
        by_interface: bool = False,
    ) -> None:
        super().__init__()
        self.widths, self.dropout, self.by_interface = widths, dropout, by_interface
        self.shared = (encoder,)  # in a tuple, so that ``SharedEncoder`` alone registers it
        self.projection = None if encoder is None else linear_like(like, encoder.linear.out_features, sum(widths))
        self.projected, self.kept_rows = KeptResult(), KeptRows()
        if encoder is None:
            self.key, self.value = (parameter_like(like, length, width) for width in widths)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.projection is not None:
            self.projection.reset_parameters()
            return
        nn.init.normal_(self.key)
        nn.init.normal_(self.value)

    def key_value(self) -> Pair:
        """Return P_k and P_v."""
        (encoder,) = self.shared
        return (self.key, self.value) if encoder is None else self._project(encoder())

    def _project(self, hidden: Tensor) -> Pair:
        projection: Any = self.projection
        with own_types(projection.weight):  # as the finalized prefix
            key, value = projection(hidden).split(self.widths, -1)
        return key, value

    def export_state(self) -> dict[str, Tensor]:
        return dict(zip(("key", "value"), self.key_value(), strict=True))

    def finalize(self) -> None:
        if self.projection is not None:
            self.key, self.value = (nn.Parameter(x.detach().clone()) for x in self.key_value())
            self.shared, self.projection = (None,), None

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        attend = partial(self._attend, self._of_call())
        return call_changed(attend, host, self.by_interface, inner, *args, **kwargs)

    def _of_call(self) -> Pair:
        """Return P_k and P_v for a call; in evaluation nobody writes to them, since they may be kept."""
        (encoder,), projection = self.shared, self.projection
        if encoder is None or projection is None:
            return self.key, self.value
        hidden = encoder.for_prefix(self)
        if torch.is_grad_enabled():
            return self._project(hidden)
        weights = (hidden, projection.weight, projection.bias)
        return self.projected.get((), weights, partial(self._project, hidden))

    def _attend(
        self, prefix: Pair, attend: Call, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any
    ) -> Tensor:
        if torch.is_grad_enabled() or (self.training and self.dropout) or is_recorded():
            rows = self._rows(prefix[0], key), self._rows(prefix[1], value)
        else:
            rows = self.kept_rows.get(prefix, (key, value), self._rows)
        keys, values = torch.cat([rows[0], key], -2), torch.cat([rows[1], value], -2)
        return attend_joined(attend, prefix[0].shape[0], query, keys, values, *rest, **settings)

    def _rows(self, prefix: Tensor, x: Tensor) -> Tensor:
        """Return (batch, heads, length, size) of P (length, heads * size) for x (batch, heads, n, size)."""
        if x.dim() != 4 or prefix.shape[1] % x.shape[-1] or x.shape[1] % (prefix.shape[1] // x.shape[-1]):
            raise ValueError(
                f"The attention call has keys or values {tuple(x.shape)}, which the prefix {tuple(prefix.shape)} "
                f"does not fit; expected (batch, heads, tokens, size)."
            )
        rows = prefix.to(x.dtype).view(1, prefix.shape[0], -1, x.shape[-1]).transpose(1, 2)
        if x.shape[0] != 1:
            rows = rows.expand(x.shape[0], -1, -1, -1)
        if self.training and self.dropout:
            rows = F.dropout(rows, self.dropout)
        if rows.shape[1] != x.shape[1]:  # the caller repeated grouped heads
            rows = rows.repeat_interleave(x.shape[1] // rows.shape[1], 1)
        return rows


def prefixes(
    model: nn.Module, hosts: Mapping[str, nn.Module], length: int, dropout: float, hidden: int | None
) -> Iterator[tuple[str, Adapter]]:
    """Yield (host's name, prefix) for each attention module and, with a hidden size, first of the shared encoder."""
    encoder = None
    for name, (like, features, widths) in _shapes(model, hosts).items():
        if hidden is not None and encoder is None:
            encoder = PrefixEncoder(like, length, features, hidden)
            yield _called_ancestor(model, list(hosts)), SharedEncoder(encoder)
        yield name, Prefix(like, widths, length, dropout, encoder, asks_interface(hosts[name]))


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
