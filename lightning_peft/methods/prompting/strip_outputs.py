"""``strip_virtual_tokens`` removes the positions of virtual tokens from the output of a backbone."""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor, nn

Remove = Callable[[Tensor], Tensor]
Pool = Callable[[Tensor], Any]


def pooler_of(host: Any) -> Pool | None:
    """Return the function by which a backbone pools its last hidden states; None where it has no module for that.

    ALBERT and BigBird apply a linear layer and an activation to the first token, instead of a module that does both.
    """
    pooler = getattr(host, "pooler", None)
    if not isinstance(pooler, nn.Linear):
        return pooler
    activation = getattr(host, "pooler_activation", None) or getattr(host, "activation", None)
    return None if activation is None else lambda hidden: activation(pooler(hidden[:, 0]))


@functools.singledispatch
def strip_virtual_tokens(output: Any, remove: Remove, pooler: Pool | None = None) -> Any:
    """Remove the virtual tokens from an output, a tensor, tuple or mapping; a pooler sees the remaining tokens.

    What a backbone pools without a module for it remains.
    """
    if not isinstance(output, MutableMapping):
        raise TypeError(f"Virtual tokens cannot be taken out of a {type(output).__name__}.")
    for name in ("last_hidden_state", "hidden_states", "pooler_output"):
        value = output.get(name)
        if value is None:
            continue
        if name == "pooler_output":
            value = value if pooler is None else pooler(output["last_hidden_state"])
        else:
            value = remove(value) if isinstance(value, Tensor) else tuple(remove(v) for v in value)
        output[name] = value
    return output


@strip_virtual_tokens.register
def _(output: Tensor, remove: Remove, pooler: Pool | None = None) -> Tensor:
    return remove(output)


@strip_virtual_tokens.register
def _(output: tuple, remove: Remove, pooler: Pool | None = None) -> tuple[Any, ...]:  # type: ignore[type-arg]
    hidden, *rest = output
    hidden = remove(hidden)
    if pooler is not None and rest:
        rest[0] = pooler(hidden)
    return hidden, *rest
