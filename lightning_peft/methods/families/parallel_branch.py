"""``ParallelBranch``: adapters beside a whole feed-forward block; ``feedforward_blocks`` finds the blocks.

A block is a module, named by a glob (``mlp``), or two layers of a larger one (BERT, OPT, torch's encoder layer), found
by ``feedforward``. Then an ``InputCapture`` at the up-projection passes the input to the branch at the down-projection.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...core.adapter import Adapter, Call
from ...core.per_row import BatchableLayerAdapter
from ...structure.base_model import base_modules
from ...structure.layer_of import is_called_linear, layer_of
from ...structure.selection import select_modules
from ...structure.structure_of import structure_of
from ...structure.towers import in_scope, split_scope

FEEDFORWARD = "feedforward"  # the pairs of feedforward.up and feedforward.down that make a block
_UNMERGEABLE = "the feed-forward block is not linear, so no weight expresses a branch beside it"


class CapturedInput(threading.local):
    """The input of a block, between its up-projection and its down-projection, in each thread."""

    x: Tensor | None = None

    def __reduce__(self) -> tuple[type[CapturedInput], tuple[()]]:
        return CapturedInput, ()  # adapters copied together share a new one; an activation is never copied

    def take(self) -> Tensor:
        """Return the input and drop the reference to it."""
        x, self.x = self.x, None
        if x is None:
            raise RuntimeError("A down-projection ran without its up-projection; name the block by a glob of a module.")
        return x


class InputCapture(BatchableLayerAdapter, Adapter):
    """Passes the input of an up-projection to the branch at its down-projection; has no parameters."""

    tensor_parallel_dims = {}
    unmergeable = _UNMERGEABLE

    def __init__(self) -> None:
        super().__init__()
        self.captured = CapturedInput()

    def reset_parameters(self) -> None: ...

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        self.pre_forward(host, _first(args, kwargs))
        return inner(*args, **kwargs)

    def pre_forward(self, host: Any, x: Tensor, *values: Any) -> Tensor:
        self.captured.x = x
        return x


class ParallelBranch(BatchableLayerAdapter, Adapter):
    """Adds a branch to the output of a block; its host is the block or, with an ``InputCapture``, the last layer."""

    tensor_parallel_dims = {}
    unmergeable = _UNMERGEABLE
    captured: CapturedInput | None = None  # shared with the ``InputCapture``, if there is one

    @abstractmethod
    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the block's output with that of the branch for the block's input added, in the type of the former."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Tensor:
        return self.post_forward(host, _first(args, kwargs), inner(*args, **kwargs))

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        if not isinstance(y, Tensor):
            raise TypeError(f"{type(host).__name__} returns a {type(y).__name__}, to which no branch can be added.")
        x = x if self.captured is None else self.captured.take()
        return self.added_to(y, x)


@dataclass(frozen=True)
class Block:
    """Feed-forward block.

    Args:
        name: Module to whose output the branch is added: the block, or its down-projection.
        up: Up-projection, whose input is that of the block; None if ``name`` is the block.
        width: Number of features of input and output.
        weight: Weight of the block's first layer, for device and type.
    """

    name: str
    up: str | None
    width: int
    weight: Tensor

    def adapters(self, branch: ParallelBranch) -> Iterator[tuple[str, Adapter]]:
        """Yield (host's name, adapter): the branch and, before it, the capture that it needs."""
        if self.up is not None:
            capture = InputCapture()
            branch.captured = capture.captured
            yield self.up, capture
        yield self.name, branch


def feedforward_blocks(model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = ()) -> list[Block]:
    """Return the feed-forward blocks that targets name, in the model's order.

    Args:
        model: Model to search.
        targets: Globs of modules that are blocks, or ``feedforward``, also after a scope as in ``vision:feedforward``.
        exclude: Globs of modules to leave out, with all blocks inside them.

    Raises:
        ValueError: No block is found, or the input and the output of a block differ in width.
    """
    scopes = [split_scope(target)[0] for target in targets if split_scope(target)[1] == FEEDFORWARD]
    globs = targets if isinstance(targets, str) else [t for t in targets if split_scope(t)[1] != FEEDFORWARD]
    up_of: dict[str, str | None] = {}  # up-projection by the name of the down-projection; None for a module
    if globs or not targets:
        up_of |= dict.fromkeys(select_modules(model, globs))  # raises for a string, and for an empty list
    if scopes:
        down_of = {down: up for up, down in _pairs(model)}
        up_of |= {down: down_of[down] for scope in scopes for down in in_scope(model, scope, list(down_of))}
    excluded = tuple(f"{name}." for name in (select_modules(model, exclude) if exclude else ()))
    names = [n for n in base_modules(model) if n in up_of and not f"{n}.".startswith(excluded)]
    if not names:
        raise ValueError(f"exclude={list(exclude)!r} leaves nothing of targets={list(targets)!r}.")
    return [_block(model, name, up_of[name]) for name in names]


def _pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (up, down) of each feed-forward network: its first up-projection, and its down-projection."""
    select_modules(model, ["feedforward.up"])  # raises without any
    networks = structure_of(model).feedforward
    for down in select_modules(model, ["feedforward.down"]):
        if down not in networks:
            raise ValueError(f"No up-projection comes before {down}; name the blocks by globs of their modules.")
        yield networks[down].ups[0], down


def _block(model: nn.Module, name: str, up: str | None) -> Block:
    host: Any = model.get_submodule(name)
    if up is None:
        linear = [module for module in base_modules(host).values() if is_called_linear(module)]
        if not linear:
            raise ValueError(f"{name} holds no linear layers, so it is no feed-forward block; target one around them.")
        first, last = linear[0], linear[-1]
    else:
        first, last = model.get_submodule(up), host
    width, out = layer_of(first).shape(first)[1], layer_of(last).shape(last)[0]
    if width != out:
        raise ValueError(f"The block at {name} takes {width} features and returns {out}; it must return as many.")
    return Block(name, up, width, layer_of(first).parameter(first))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()))
