"""What runs beside a whole feed-forward block: where the block's input is seen, and where a branch's result is added.

A block is a module, named by a glob (``mlp``), or two layers of a larger one (BERT, OPT, torch's encoder layer), found
by ``feedforward``: then an adapter at the up-projection hands the input to the branch at the down-projection.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Call
from ...core.per_row import BatchableLayerAdapter
from ...structure.base_model import base_modules
from ...structure.layer_types import is_called_linear, layer_of
from ...structure.selection import select_modules

FEEDFORWARD = "feedforward"  # the pairs of feedforward.up and feedforward.down that make a block
_UNMERGEABLE = "the feed-forward block is not linear, so no weight expresses what runs beside it"


class CapturedInput:
    """The input of a block, between its up-projection and its down-projection."""

    x: Tensor | None = None

    def __reduce__(self) -> tuple[type[CapturedInput], tuple[()]]:
        return CapturedInput, ()  # copies share a new one; an activation is never copied

    def take(self) -> Tensor:
        """Return the input and forget it."""
        x, self.x = self.x, None
        if x is None:
            raise RuntimeError("A down-projection ran without its up-projection; name the block by a glob of a module.")
        return x


class InputCapture(BatchableLayerAdapter, Adapter):
    """Hands the input of an up-projection to the branch at its down-projection; has no parameters."""

    tensor_parallel_dims = {}
    unmergeable = _UNMERGEABLE

    def __init__(self) -> None:
        super().__init__()
        self.held = CapturedInput()

    def reset_parameters(self) -> None: ...

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        self.pre_forward(host, _first(args, kwargs))
        return inner(*args, **kwargs)

    def pre_forward(self, host: Any, x: Tensor, *values: Any) -> Tensor:
        self.held.x = x
        return x


class ParallelBranch(BatchableLayerAdapter, Adapter):
    """y = block(x) + factor branch(x), on the block itself or, with a tap, on its down-projection."""

    tensor_parallel_dims = {}
    unmergeable = _UNMERGEABLE
    held: CapturedInput | None = None  # of the tap
    factor = 1.0  # of the branch

    @abstractmethod
    def branch(self, x: Tensor) -> Tensor:
        """Return what is added to the block's output, for its input."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Tensor:
        return self.post_forward(host, _first(args, kwargs), inner(*args, **kwargs))

    def post_forward(self, host: Any, x: Tensor, y: Tensor, *values: Any) -> Tensor:
        if not isinstance(y, Tensor):
            raise TypeError(f"{type(host).__name__} returns a {type(y).__name__}, to which no branch can be added.")
        x = x if self.held is None else self.held.take()
        return torch.add(y, self.branch(x).to(y.dtype), alpha=self.factor)


@dataclass(frozen=True)
class Block:
    """One feed-forward block."""

    name: str  # where the branch's result is added: the block, or its down-projection
    tap: str | None  # where its input is seen, if not there: the up-projection
    width: int  # number of features that go in and come out
    weight: Tensor  # of its first layer, for device and type

    def adapters(self, beside: ParallelBranch) -> Iterator[tuple[str, Adapter]]:
        """Yield (host's name, adapter): the branch, and the tap that it needs."""
        if self.tap is not None:
            tap = InputCapture()
            beside.held = tap.held
            yield self.tap, tap
        yield self.name, beside


def feedforward_blocks(model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = ()) -> list[Block]:
    """Return the feed-forward blocks of a model that targets name, in its order.

    Args:
        model: Where to look.
        targets: Globs of modules whose call is a block, or ``feedforward``.
        exclude: Globs of modules to leave out, with all blocks inside them.

    Raises:
        ValueError: Nothing is found, or what goes into a block is not as wide as what comes out.
    """
    globs = targets if isinstance(targets, str) else [target for target in targets if target != FEEDFORWARD]
    found: dict[str, str | None] = {}
    if globs or not targets:
        found |= dict.fromkeys(select_modules(model, globs))  # which refuses a string, and no target at all
    if FEEDFORWARD in targets:
        found |= {down: up for up, down in _pairs(model)}
    without = tuple(f"{name}." for name in (select_modules(model, exclude) if exclude else ()))
    names = [n for n in base_modules(model) if n in found and not f"{n}.".startswith(without)]
    if not names:
        raise ValueError(f"exclude={list(exclude)!r} leaves nothing of targets={list(targets)!r}.")
    return [_block(model, name, found[name]) for name in names]


def _pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each down-projection's name after that of the first up-projection before it in the same block."""
    ups, downs, before = (
        select_modules(model, ["feedforward.up"]),
        select_modules(model, ["feedforward.down"]),
        list[str](),
    )
    for name in base_modules(model):
        if name in ups:
            before.append(name)
        elif name in downs:
            if not before:
                raise ValueError(f"No up-projection comes before {name}; name the blocks by globs of their modules.")
            depth = {up: len(os.path.commonprefix([up.split("."), name.split(".")])) for up in before}
            yield max(depth, key=depth.__getitem__), name
            before.clear()


def _block(model: nn.Module, name: str, tap: str | None) -> Block:
    host: Any = model.get_submodule(name)
    if tap is None:
        linear = [module for module in base_modules(host).values() if is_called_linear(module)]
        if not linear:
            raise ValueError(f"{name} holds no linear layers, so it is no feed-forward block; target one around them.")
        first, last = linear[0], linear[-1]
    else:
        first, last = model.get_submodule(tap), host
    width, out = layer_of(first).shape(first)[1], layer_of(last).shape(last)[0]
    if width != out:
        raise ValueError(f"The block at {name} takes {width} features and returns {out}; it must return as many.")
    return Block(name, tap, width, layer_of(first).parameter(first))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))
