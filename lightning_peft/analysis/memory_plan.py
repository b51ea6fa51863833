"""``plan_memory`` estimates memory per GPU, traffic and file sizes of a training step, using fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..checkpoints.adapter_state import adapter_state
from ..core.adapted_module import adapters
from ..structure.base_model import base_parameters
from ..structure.quantized import quantized_weights
from ..structure.roles import blocks
from .saved_activations import saved_bytes


@dataclass(frozen=True)
class GPUShare:
    """Bytes that one GPU holds.

    Args:
        weights: Its share of all weights, and all buffers.
        gradients: Its share of the gradients, and what DDP copies them into to send them.
        optimizer: Its share of the optimizer's state.
        activations: What is saved for the backward pass.
        transient: Weights that it holds during a part of the step: gathered from others, or decoded.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    transient: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one training step.

    FSDP shards the frozen base and, beside adapters, nothing else: what trains, its gradients and its optimizer state
    are whole on each GPU. Where no adapter exists, it shards all of them.

    Args:
        trained: Numbers that train.
        frozen: Numbers that do not.
        adapted: Whether there are adapters.
        frozen_weights: Bytes of the frozen weights, as they are stored.
        trained_weights: Bytes of what trains.
        buffers: Bytes of the buffers, which nothing shards.
        gradients: Bytes of the gradients.
        optimizer: Bytes of the optimizer's state.
        checkpoint: Bytes of an adapter file.
        unsharded: Bytes that FSDP holds whole: what it shards outside of the blocks, and the two largest blocks, of
            which one computes while the next arrives.
        dequantized: Bytes of the largest quantized weight, in 32 bits.
        activations: Bytes saved for the backward pass, by the number of tokens in a row.
    """

    trained: int
    frozen: int
    adapted: bool
    frozen_weights: int
    trained_weights: int
    buffers: int
    gradients: int
    optimizer: int
    checkpoint: int
    unsharded: int
    dequantized: int
    activations: Mapping[int, int]

    def share(self, tokens: int, processes: int = 1, sharded: bool = False) -> GPUShare:
        """Return what each GPU holds; arguments are those of ``memory``, which adds it up."""
        count = processes if sharded else 1
        trained_shards = 1 if self.adapted else count  # number of shards of trained parameters
        copies = 2 if processes > 1 and not sharded else 1
        return GPUShare(
            weights=_ceil_div(self.frozen_weights, count)
            + _ceil_div(self.trained_weights, trained_shards)
            + self.buffers,
            gradients=_ceil_div(self.gradients, trained_shards) * copies,
            optimizer=_ceil_div(self.optimizer, trained_shards),
            activations=self.activations[tokens],
            transient=self.dequantized + (self.unsharded if count > 1 else 0),
        )

    def memory(self, tokens: int, processes: int = 1, sharded: bool = False) -> int:
        """Return the bytes that each of N GPUs holds at most, each with a batch of the same size.

        With frozen weights F, trained ones T, their gradients G, optimizer state O, buffers B, activations A, gathered
        weights U and a decoded weight D: one GPU holds F + T + G + O + B + A + D, and G once more with DDP, which sends
        copies. FSDP holds F / N + T + G + O + B + A + D + U beside adapters, (F + T + G + O) / N + B + A + D + U
        without. It is more than the truth where gradients come while activations go.

        Args:
            tokens: Tokens in a row, one of ``activations``.
            processes: Number N of GPUs.
            sharded: Whether FSDP shards, and not DDP.
        """
        return self.share(tokens, processes, sharded).total

    def traffic(self, processes: int, sharded: bool = False) -> int:
        """Return the bytes that each of N GPUs sends in one step, in rings.

        DDP reduces the gradients G of what trains on all: 2 (N - 1) / N G. FSDP gathers weights for the forward pass
        and again for the backward pass, (N - 1) / N of them each. Beside adapters these are the frozen weights F, and
        gradients travel as in DDP: (N - 1) / N (2 F + 2 G). Without, they are all weights, and gradients are reduced
        and scattered: (N - 1) / N (2 F + 2 T + G).

        Args:
            processes: Number N of GPUs.
            sharded: Whether FSDP shards, and not DDP.
        """
        sent = 2 * self.gradients
        if sharded and self.adapted:
            sent += 2 * self.frozen_weights
        elif sharded:
            sent = 2 * (self.frozen_weights + self.trained_weights) + self.gradients
        return sent * (processes - 1) // processes


def plan_memory(
    model: nn.Module,
    step: Callable[[Any, Any], Tensor],
    batches: Mapping[int, Any],
    optimizer_bytes: float = 8.0,
    checkpointed: bool = False,
) -> MemoryPlan:
    """Estimate the memory of training; the model may be on the meta device and is left as it is.

    Args:
        model: An adapted model, or one of which everything trains.
        step: Computes the loss of a model and a batch.
        batches: A batch for each number of tokens; values of floating tensors do not matter.
        optimizer_bytes: State for each number that trains: 8 for Adam's two averages in 32 bits, 2 for Adam in 8 bits.
        checkpointed: Whether blocks keep their inputs only and run again in the backward pass.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    adapted = any(True for _ in adapters(model))
    numbers = sum(p.numel() for p in trained)
    quantized_sizes = {id(codes): numbers for codes, numbers in quantized_weights(model)}
    return MemoryPlan(
        trained=numbers,
        frozen=sum(quantized_sizes.get(id(p), p.numel()) for p in frozen),
        adapted=adapted,
        frozen_weights=_bytes(frozen),
        trained_weights=_bytes(trained),
        buffers=_bytes(model.buffers()),
        gradients=_bytes(trained),
        optimizer=int(numbers * optimizer_bytes),
        checkpoint=_bytes(adapter_state(model, packed=True).values()),
        unsharded=_gathered(model, adapted),
        dequantized=4 * max(quantized_sizes.values(), default=0),
        activations={n: saved_bytes(model, step, batch, checkpointed) for n, batch in batches.items()},
    )


def _gathered(model: nn.Module, adapted: bool) -> int:
    sharded = {n: p for n, p in base_parameters(model).items() if not (adapted and p.requires_grad)}
    block_bytes = [_bytes(p for n, p in sharded.items() if n.startswith(f"{block}.")) for block in blocks(model)]
    return _bytes(sharded.values()) - sum(block_bytes) + sum(sorted(block_bytes)[-2:])


def _ceil_div(whole: int, count: int) -> int:
    return -(-whole // count)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
