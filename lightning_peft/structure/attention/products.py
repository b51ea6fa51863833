"""``AttentionProducts``: attention that a module writes out, a softmax of scores between two products.

Scores may be scaled by numbers, and masks or biases may be added to them; weights may be dropped out. Each tensor that
follows from the scores or weights by these operations is recognized by its identity. What uses others is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transformers_api import attention_heads
from .batched_products import PRODUCTS, are_batches, factors
from .interface import interface_attention

_KEEP = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "view", "reshape")
_MASK = ("add", "add_", "masked_fill", "masked_fill_", "where", "max", "maximum")
_FACTOR: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("mul", "mul_"), lambda factor: factor),
    **dict.fromkeys(("div", "div_"), lambda divisor: 1 / divisor),
}
_OPERATIONS = frozenset((*PRODUCTS, *_KEEP, *_MASK, *_FACTOR, "softmax", "dropout"))
_ALIBI = ("Bloom", "Mpt")  # modules that add a bias which falls with the distance of a key, the same for all queries


@dataclass(eq=False)
class _Scores:
    """Scores ``scale * q k^T + ...``, and what they have become since."""

    query: Tensor
    key: Tensor
    tensor: Tensor
    scale: Any = 1.0  # a number, or a tensor of one number
    bias: Tensor | None = None


@dataclass(eq=False)
class _Weights:
    """Softmax of scores, and what it has become since."""

    scores: _Scores
    tensor: Tensor
    dtype: torch.dtype
    dropout: float = 0.0


class AttentionProducts:
    """Follows the operations of a module, and calls ``change`` where weights meet values.

    Args:
        change: Function of the attention function and its arguments; see ``AttentionCalls``.
        host: The module.
    """

    def __init__(self, change: Callable[..., Tensor], host: nn.Module | None) -> None:
        self.change, self.host, self.seen = change, host, False
        self.scores: list[_Scores] = []  # the latest are the last
        self.weights: _Weights | None = None

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return ``func(*args, **kwargs)``; the product with values is changed."""
        name = getattr(func, "__name__", "")
        if name not in _OPERATIONS:
            return func(*args, **kwargs)
        if name in PRODUCTS:
            return self._product(func, name, args, kwargs)
        output = func(*args, **kwargs)
        if name == "softmax":
            self._softmax(output, *args, **kwargs)
        elif self.weights is not None and args and args[0] is self.weights.tensor:
            self._follow_weights(name, output, *args[1:], **kwargs)
        elif self.scores and isinstance(output, Tensor):
            self._follow_scores(name, output, args)
        return output

    def _product(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        weights = self.weights
        if weights is not None and len(args) > 1 and args[0] is weights.tensor:
            self.seen, self.weights = True, None
            self.scores.clear()
            return self._changed(weights, args[1], func(*args, **kwargs))
        output = func(*args, **kwargs)
        a, b = factors(name, args, kwargs)
        if are_batches(a, b):
            scores = _Scores(a, b.mT, output)
            if name == "baddbmm":
                scores.scale, scores.bias = kwargs.get("alpha", 1.0), self._alibi(args[0], output)
            self.scores.append(scores)
        return output

    def _softmax(self, output: Tensor, x: Tensor, dim: int | None = None, *_: Any, **__: Any) -> None:
        found = next((scores for scores in self.scores if scores.tensor is x), None)
        if found is not None and dim in (-1, x.dim() - 1):
            self.weights = _Weights(found, output, output.dtype)

    def _follow_weights(self, name: str, output: Any, p: Any = 0.5, training: Any = True, *_: Any, **__: Any) -> None:
        weights = self.weights
        if weights is not None and (name in _KEEP or name == "dropout"):
            weights.tensor = output
            if name == "dropout" and training:
                weights.dropout = p

    def _follow_scores(self, name: str, output: Tensor, args: Any) -> None:
        operands = [x for x in args if isinstance(x, Tensor)]
        followed = [scores for scores in self.scores if any(x is scores.tensor for x in operands)]
        if len(followed) > 1:  # scores of several products: it is not known which of them more keys would enter
            self.scores = [scores for scores in self.scores if scores not in followed]
        if len(followed) != 1:
            return
        (found,) = followed
        other = next((x for x in args if x is not found.tensor), None)
        number = isinstance(other, int | float) or (isinstance(other, Tensor) and other.dim() == 0)
        kept = output.shape[-2:] == found.tensor.shape[-2:] and (number or name not in ("max", "maximum", *_FACTOR))
        if not kept or (name in _FACTOR and args[0] is not found.tensor):
            self.scores.remove(found)
            return
        if name in _FACTOR:
            factor = _FACTOR[name](other)
            found.scale *= factor
            found.bias = None if found.bias is None else found.bias * factor
        elif name in ("add", "add_") and isinstance(other, Tensor) and found.bias is None:
            found.bias = self._alibi(other, output)
        found.tensor = output

    def _alibi(self, bias: Tensor, scores: Tensor) -> Tensor | None:
        """Return what was added to scores if it falls with distance."""
        known = any(cls.__name__.startswith(_ALIBI) for cls in type(self.host).__mro__)
        separate = bias.dim() >= 3 and bias.shape[-3] == scores.shape[-3] and bias.shape[-2] == 1
        return bias if known and separate else None

    def _changed(self, weights: _Weights, value: Tensor, output: Tensor) -> Tensor:
        """Return the product of weights and values after ``change``."""
        rows, scale = self._rows(weights.scores), weights.scores.scale
        operands = (weights.scores.query, weights.scores.key, value)
        query, key, values = (x.view(*rows, *x.shape[-2:]) if x.dim() == 3 else x for x in operands)
        rest = partial(eager_attention_to_more, weights, rows, key.shape[-2])

        def attend(query: Tensor, keys: Tensor, more: Tensor, *_: Any, **__: Any) -> Tensor:
            if keys.shape[-2] == key.shape[-2]:
                return output.view(*rows, *output.shape[-2:])
            # Other adapters of the host see this call as one of the interface.
            joined: Tensor = interface_attention(rest, self.host, query, keys, more, scaling=scale)[0]
            return joined.transpose(1, 2)

        changed: Tensor = self.change(attend, query, key, values, scale=scale)
        return changed.reshape(output.shape)

    def _rows(self, scores: _Scores) -> tuple[int, int]:
        """Return the numbers of batch rows and of query heads."""
        if scores.query.dim() == 4:
            return scores.query.shape[0], scores.query.shape[1]
        heads = None if self.host is None else attention_heads(self.host)
        if heads is None:
            raise TypeError(f"{type(self.host).__name__} does not say how many heads it has; choose other targets.")
        return len(scores.query) // heads, heads


def eager_attention_to_more(
    weights: _Weights,
    rows: tuple[int, int],
    known: int,
    module: Any,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    """Attend to keys of which the last, ``known`` many, have scores already; as a function of the interface."""
    scores, added = weights.scores, keys.shape[-2] - known
    near = query @ keys[..., :added, :].mT.to(query.dtype) * scores.scale
    near = near + _extended(scores.bias, added, rows)
    far = scores.tensor.view(*rows, *scores.tensor.shape[-2:])
    both = torch.cat([near.to(far.dtype), far], -1).softmax(-1, dtype=weights.dtype).to(values.dtype)
    output: Tensor = F.dropout(both, weights.dropout) @ values
    return output.transpose(1, 2), both


def _extended(bias: Tensor | None, added: int, rows: tuple[int, int]) -> Tensor | float:
    """Return the bias of keys before the first one, in whose distances it falls; 0 without a bias."""
    if bias is None:
        return 0.0
    if bias.shape[-1] < 2:
        raise ValueError("One token alone does not tell how ALiBi falls with distance; start from two tokens.")
    slope = bias.diff(dim=-1).amax(-1, keepdim=True)  # padding stands still
    positions = torch.arange(-added, 0, device=bias.device, dtype=bias.dtype)
    extended = bias[..., :1] + slope * positions
    return extended.view(-1, rows[1], *extended.shape[-2:])
