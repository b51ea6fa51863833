"""``TrainableTokens``: rows of the input embeddings, as those of new tokens, train while others stay frozen."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.adapter import Adapter
from ..core.method import Method, check_setting
from ..structure.base_model import base_modules
from ..structure.layer_of import layer_of
from ..structure.layer_types import LinearType
from ..structure.quantized import QuantizedType
from ..structure.selection import select_modules
from ..structure.transformers_api import input_embeddings, outermost_pretrained
from .families.token_rows import TiedTokenRows, TokenRows
from .families.vocabulary import resolve_tokens


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Trains the embeddings of some tokens: w_t instead of row t of the input embeddings, for each t in ``tokens``.

    A head that is tied to the input embeddings uses the same rows, and so do all layers that share them. Only these
    rows are parameters, so that no other row moves, whatever the optimizer does, and its state is as small as they are.
    New tokens need rows in the base first: ``ids = lp.add_tokens(model, tokenizer, ["<call>"])``, before ``inject``.

    Args:
        name: Name of the adapters on their hosts, and in files.
        tokens: Ids, or tokens as they stand in the vocabulary of ``tokenizer``, which become ids at once.
        tokenizer: The tokenizer, or its folder or name; only tokens that are given as text need it, and files do not.
        output_head: Whether the same rows of an output head that is not tied train as well, apart.
        targets: Globs of embeddings, and of heads, for models that are not transformers' or have several.

    Raises:
        ValueError: There are no tokens, one is not in the vocabulary, or an id is not a whole number.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 4))
        >>> _ = lp.inject(model, lp.TrainableTokens(tokens=[7, 42], targets=["0"]))
        >>> lp.summary(model).trainable  # two rows of 16
        32
    """

    name: str = "trainable_tokens"
    tokens: list[int | str] = dataclasses.field(default_factory=list)
    tokenizer: Any = ""
    output_head: bool = False
    targets: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        ids = resolve_tokens(self.tokens, self.tokenizer)
        object.__setattr__(self, "tokens", ids)
        object.__setattr__(self, "tokenizer", "")  # ids are all that files and other machines need

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        ids = [token for token in self.tokens if isinstance(token, int)]
        sources = dict[int, TokenRows]()
        for name, host in self._layers(model):
            weight = host.weight
            check_layer(name, host, ids)
            if (source := sources.get(id(weight))) is not None:
                yield name, TiedTokenRows(host, source)
            else:
                sources[id(weight)] = TokenRows(host, ids)
                yield name, sources[id(weight)]

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """Yield (name, layer) of those whose rows train: embeddings first, and all layers that share their weight."""
        chosen = list(select_modules(model, self.targets).values()) if self.targets else _tables(model)
        chosen += _heads(model) if self.output_head else []
        for module in chosen:
            if not isinstance(getattr(module, "weight", None), nn.Parameter):
                raise TypeError(f"{type(module).__name__} has no weight with a row for each token; name embeddings.")
        weights = {id(module.weight) for module in chosen}
        for name, module in sharing_layers(model, weights):
            if id(module._parameters.get("weight")) not in weights:
                raise TypeError(
                    f"{name} shares the rows of tokens as another parameter than its weight, where trained ones would "
                    f"not be seen; untie it."
                )
            yield name, module


def sharing_layers(model: nn.Module, weights: Collection[int]) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of those that hold parameters of these ids, embeddings first; the first has the rows."""
    modules = {"": model, **base_modules(model)}
    sharing = [(n, m) for n, m in modules.items() if any(id(p) in weights for p in m._parameters.values())]
    return sorted(sharing, key=lambda pair: not isinstance(pair[1], nn.Embedding))


def _tables(model: nn.Module) -> list[Any]:
    """Return the input embeddings of a model."""
    tables = [table for _, network in outermost_pretrained(model) if (table := input_embeddings(network)) is not None]
    tables = tables or [module for module in model.modules() if isinstance(module, nn.Embedding)]
    check_setting(
        len(tables) == 1, "targets", [], f"globs of embeddings, since the model has {len(tables)} that may be"
    )
    return tables


def _heads(model: nn.Module) -> list[Any]:
    """Return the layer that predicts tokens."""
    heads = [head for _, net in outermost_pretrained(model) if (head := net.get_output_embeddings()) is not None]
    check_setting(len(heads) == 1, "output_head", True, f"False, since the model has {len(heads)} heads; see targets")
    return heads


def check_layer(name: str, host: Any, ids: Sequence[int]) -> None:
    """Raise where rows of a layer cannot train, or a token has none."""
    layer = layer_of(host)  # which refuses max_norm
    kind = type(host).__name__
    if isinstance(layer, QuantizedType) or not host.weight.is_floating_point():
        raise TypeError(f"{name} ({kind}) is stored in few bits; dequantize it, or leave it out of quantization.")
    if not (layer.is_embedding or type(layer) is LinearType) or layer.parameter(host).dim() != 2:
        raise TypeError(f"{name} ({kind}) has no row for each token; name embeddings, or a linear head.")
    if getattr(host, "scale_grad_by_freq", False):
        raise TypeError(f"{name} divides gradients by how often a token is read, which is not done for rows apart.")
    rows = layer.shape(host)[1 if layer.is_embedding else 0]
    if ids[-1] >= rows:
        raise ValueError(
            f"Token {ids[-1]} has no row in {name}, which has {rows}. Add rows before adapters, as for training: "
            f"lightning_peft.add_tokens(model, tokenizer, tokens), or model.resize_token_embeddings({ids[-1] + 1})."
        )
    if layer.is_embedding and list(ids) == [host.padding_idx]:
        warnings.warn(f"Token {ids[0]} is the padding of {name}, whose row gets no gradient from it.", stacklevel=2)
