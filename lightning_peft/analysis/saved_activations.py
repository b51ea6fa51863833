"""``saved_bytes`` counts the bytes that a forward pass saves for the backward pass, using fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..ops.torch_api import storage_key
from ..structure.roles import blocks
from ..structure.transformers_api import without_checkpointing
from .fake_model import fake_tensor_like, shapes_only


def saved_bytes(model: nn.Module, step: Callable[[Any, Any], Tensor], batch: Any, checkpointed: bool = False) -> int:
    """Return the bytes that a forward pass saves for the backward pass, each storage once, without allocating them.

    Parameters, buffers and the batch are left out; what custom autograd functions keep is counted. With gradient
    checkpointing, it is what is held when the backward pass has run the hungriest block again: what is saved outside of
    the blocks + the inputs of all blocks + what that block saves beside its input.

    Args:
        model: Any module, on any device; a copy of its shapes runs.
        step: Computes the loss of a model and a batch.
        batch: Tensors on any device; of floating ones the shapes count.
        checkpointed: Whether blocks keep their inputs only, as they do where the model has that switched on.
    """
    names = list(blocks(model))  # found by a trace, which computes
    with shapes_only(model) as fake:
        rows = tree_map_only(Tensor, fake_tensor_like, batch)
        saved = _SavedTensorCounter([fake.get_submodule(name) for name in names])
        with without_checkpointing(fake) as switched, saved:
            loss = step(fake, rows)
        for x in _tensors_on_nodes(loss):
            saved.keep(x)
        saved.leave_out([*fake.parameters(), *fake.buffers(), *filter(torch.is_tensor, tree_leaves(rows))])
    return saved.checkpointed() if checkpointed or switched else saved.total()


class _SavedTensorCounter(ExitStack):
    """Context that counts saved tensors, by the block that saves them.

    Args:
        modules: The blocks.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[int, int]] = {}  # bytes of a storage and the block that saved it, -1 outside
        self.held = list[Any]()  # storages, so that no later one gets the address of one that is gone
        self.block, self.modules, self.inputs = -1, modules, [0] * len(modules)

    def __enter__(self) -> _SavedTensorCounter:
        self.enter_context(torch.autograd.graph.saved_tensors_hooks(self.keep, lambda x: x))
        for number, module in enumerate(self.modules):
            enter = module.register_forward_pre_hook(partial(self._enter, number))
            leave = module.register_forward_hook(self._leave)
            self.callback(enter.remove)
            self.callback(leave.remove)
        return self

    def keep(self, x: Tensor) -> Tensor:
        """Count the storage of a tensor that is saved."""
        storage = x.untyped_storage()
        self.held.append(storage)
        self.sizes.setdefault(storage_key(x), (storage.nbytes(), self.block))
        return x.detach()  # an output that its own node holds would never be freed

    def leave_out(self, tensors: list[Tensor]) -> None:
        """Take tensors out of the count."""
        for x in tensors:
            self.sizes.pop(storage_key(x), None)

    def total(self) -> int:
        """Return all bytes."""
        return sum(size for size, _ in self.sizes.values())

    def checkpointed(self) -> int:
        """Return the bytes where blocks keep their inputs alone, and one of them has run again."""
        by_block = [sum(size for size, block in self.sizes.values() if block == i) for i in range(len(self.inputs))]
        inputs = [
            input_bytes if size else 0 for input_bytes, size in zip(self.inputs, by_block, strict=True)
        ]  # none if nothing trains
        largest_rest = max((size - input_bytes for size, input_bytes in zip(by_block, inputs, strict=True)), default=0)
        return self.total() - sum(by_block) + sum(inputs) + largest_rest

    def _enter(self, number: int, module: nn.Module, args: Any) -> None:
        self.block = number
        self.inputs[number] += sum(x.nbytes for x in args if isinstance(x, Tensor) and x.is_floating_point())

    def _leave(self, *call: Any) -> None:
        self.block = -1


def _tensors_on_nodes(loss: Tensor) -> Iterator[Tensor]:
    """Yield tensors that custom functions keep as attributes, which hooks on saved tensors do not see."""
    seen, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield from filter(torch.is_tensor, tree_leaves(getattr(node, "__dict__", {})))
