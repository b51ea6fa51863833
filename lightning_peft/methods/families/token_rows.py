"""``TokenRows`` and its kin: rows of an embedding, and of an output head, that train while the others stay frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Adapter, Call, parameter_like
from ...core.per_row import BatchableLayerAdapter
from ...structure.layer_of import layer_of


class TokenLayer(BatchableLayerAdapter, Adapter):
    """Uses trained rows in place of those of its host, a layer with one row of its weight for each token.

    Args:
        host: Embedding, or linear layer that predicts tokens.
        tokens: Ids of the tokens, ascending.
    """

    exclusive = True  # what others add to these rows would be lost in the embedding, and counted in the head
    merges_ties = True

    def __init__(self, host: Any, tokens: Sequence[int]) -> None:
        super().__init__()
        self.ids, self.layer = tuple(tokens), layer_of(host)
        weight = self.layer.parameter(host)
        device = "cpu" if weight.is_meta else weight.device
        # A buffer that is in no file: the settings of the method say the ids.
        self.register_buffer("tokens", torch.tensor(self.ids, device=device), persistent=False)

    tokens: Tensor

    def reset_parameters(self, host: Any = None) -> None:
        """Start from the rows of the host."""
        self.tokens.copy_(torch.tensor(self.ids))

    def trained_rows(self) -> Tensor:
        """Return the rows (tokens, features)."""
        raise NotImplementedError

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        return self.post_forward(host, x, inner(*args, **kwargs))

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        return self._in_embedding(host, x, y) if self.layer.is_embedding else self._in_head(host, x, y)

    def _in_embedding(self, host: Any, x: Tensor, y: Tensor) -> Tensor:
        index = torch.searchsorted(self.tokens, x).clamp(max=len(self.ids) - 1)
        chosen = (self.tokens[index] == x)[..., None]
        return torch.where(chosen, self._embedded(host, index), y)

    def _embedded(self, host: Any, index: Tensor) -> Tensor:
        """Return what the host would return for these rows; its padding gets no gradient, as everywhere in torch."""
        padding = self.ids.index(host.padding_idx) if host.padding_idx in self.ids else None
        rows = self.trained_rows().to(host.weight.dtype)
        cls: Any = type(host)
        if cls._host_class.forward is nn.Embedding.forward:
            return F.embedding(index, rows, padding)
        view = cls.__new__(cls)  # another forward may scale rows; it rounds here as it does there
        view.__dict__ = {**vars(host), "_parameters": {**host._parameters, "weight": rows}, "padding_idx": padding}
        result: Tensor = cls._host_class.forward(view, index)
        return result

    def _in_head(self, host: Any, x: Tensor, y: Tensor) -> Tensor:
        rows = self.trained_rows()
        change = rows - self.layer.read(host)[self.tokens].to(rows.dtype)
        return y.index_add(-1, self.tokens, F.linear(x, change.to(x.dtype)).to(y.dtype))

    def extra_repr(self) -> str:
        return f"{len(self.ids)} tokens"


class TokenRows(TokenLayer):
    """Rows that train, of shape (tokens, features); they start as those of the host.

    They are no differences, so that a file gives the same rows on each base, whatever new rows started as there.
    """

    def __init__(self, host: Any, tokens: Sequence[int]) -> None:
        super().__init__(host, tokens)
        stored = self.layer.parameter(host)
        self.weight = parameter_like(stored, len(self.ids), stored.shape[1])
        self.reset_parameters(host)

    @torch.no_grad()
    def reset_parameters(self, host: Any = None) -> None:
        super().reset_parameters()
        if self.weight.is_meta:
            return  # loading fills them, or this is called again once they have storage
        if host is None:
            raise TypeError("Rows of tokens start from those of the base: load the base model first, then inject.")
        self.weight.copy_(self.layer.parameter(host)[self.tokens])

    def trained_rows(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    def merge(self, host: Any) -> None:
        """Write the rows into the weight of the host, and so into that of layers which share it."""
        stored = self.layer.parameter(host)
        index = torch.tensor(self.ids, device=stored.device)
        stored.index_copy_(0, index, self.weight.to(stored))


class TiedTokenRows(TokenLayer):
    """Uses the rows of another layer that shares the weight of this one; holds no tensor of its own.

    Args:
        host: This layer.
        source: Adapter of the other layer.
    """

    def __init__(self, host: Any, source: TokenRows) -> None:
        super().__init__(host, source.ids)
        self.source = (source,)  # in a tuple, so that its tensors are not those of this module, too

    def trained_rows(self) -> Tensor:
        return self.source[0].weight

    def merge(self, host: Any) -> None:
        """Do nothing, since the other layer's merge writes the weight that both share."""
