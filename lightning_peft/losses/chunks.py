"""``token_values`` and ``cross_entropy_sum``: what losses need of logits, of which one chunk exists at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy, linear_cross_entropy
from torch.utils.checkpoint import checkpoint

from .head_inputs import HeadInputs

TokenFunction = Callable[[Tensor, Tensor], Tensor]  # logits (n, vocabulary) and tokens (n,) -> values (n, ...)

# Numbers in a chunk of logits. On a CPU, chunks of this size take no longer than whole logits; with torch's own choice
# of chunks a step takes 5 to 10 times as long (benchmarks/next_token.py). Other devices, where launching kernels costs,
# were not measured: their chunks are larger.
_ON_CPU, _ELSEWHERE, _FEWEST_ROWS = 2**22, 2**26, 64


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return -log p of each token (n,)."""
    return cross_entropy(logits, tokens, reduction="none")


def token_values(function: TokenFunction, inputs: HeadInputs, tokens: Tensor, chunk: int | None = None) -> Tensor:
    """Return function(logits, tokens), computed in chunks of rows.

    Where hidden states alone need a gradient and each has one value, its gradient is computed with it. Else backward
    computes each chunk again: a trained head needs the gradients of the values, float16 the scale of the loss.

    Args:
        function: What is computed of each row apart.
        inputs: Hidden states and head.
        tokens: The token at each place (places,).
        chunk: Rows at a time; by default as many as make a few million logits.

    Shape:
        (places, ...)
    """
    of_rows = partial(_of_rows, function, inputs)
    if inputs.head is None:
        return of_rows(inputs.rows, tokens)
    size = chunk or chunk_rows(inputs)
    parts = list(zip(torch.split(inputs.rows, size), torch.split(tokens, size), strict=True))
    trains_more = inputs.first.requires_grad
    if not torch.is_grad_enabled() or not (trains_more or inputs.rows.requires_grad):
        return torch.cat([of_rows(*part) for part in parts])
    if trains_more or inputs.first.dtype == torch.float16 or function(inputs.first[None], tokens[:1]).dim() > 1:
        return torch.cat([checkpoint(of_rows, *part, use_reentrant=False) for part in parts])
    values: Tensor = _ValuesWithGradients.apply(inputs.rows, tokens, of_rows, size)  # type: ignore[no-untyped-call]
    return values


def cross_entropy_sum(inputs: HeadInputs, tokens: Tensor, chunk: int | None = None) -> Tensor:
    """Return the sum of -log p of the tokens; arguments as for ``token_values``.

    Of a plain linear head, torch computes it in one buffer for the logits of a chunk, which takes half the memory of
    autograd and, where the head trains, no second forward.
    """
    if not _is_plain_linear(inputs):
        return token_values(token_losses, inputs, tokens, chunk).sum()
    options = nn.LinearCrossEntropyOptions(
        chunking_method=None,
        batch_chunk_size=chunk or chunk_rows(inputs),
        allow_retain_graph=True,  # as of any other loss
    )
    head = inputs.head
    return linear_cross_entropy(
        inputs.rows, head.weight, tokens, linear_bias=head.bias, reduction="sum", options=options
    )


def chunk_rows(inputs: HeadInputs) -> int:
    """Return how many rows make a chunk."""
    numbers = _ON_CPU if inputs.rows.device.type == "cpu" else _ELSEWHERE
    return max(_FEWEST_ROWS, numbers // len(inputs.first))


class _ValuesWithGradients(torch.autograd.Function):
    """A value of each row, and its gradient, computed in forward, where a chunk of logits exists at a time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, of_rows: TokenFunction, size: int) -> Tensor:
        gradients, values = torch.empty_like(rows), []
        for part, out, own in zip(*(torch.split(x, size) for x in (rows, gradients, tokens)), strict=True):
            with torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):  # a chunk is not kept for backward
                part = part.detach().requires_grad_()
                found = of_rows(part, own)
                (gradient,) = torch.autograd.grad(found.sum(), part)
            out.copy_(gradient)
            values.append(found.detach())
            del found, gradient  # before the next chunk
        ctx.save_for_backward(gradients)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return (gradient[:, None] * gradients).to(gradients.dtype), None, None, None


def _unchanged(x: Tensor) -> Tensor:
    return x


def _of_rows(function: TokenFunction, inputs: HeadInputs, rows: Tensor, tokens: Tensor) -> Tensor:
    return function(inputs.logits_of(rows), tokens)


def _is_plain_linear(inputs: HeadInputs) -> bool:
    """Return whether logits are x W^T + bias in float32 or wider, with the weight that the head holds, and no more."""
    head, rows = inputs.head, inputs.rows
    if type(head) is not nn.Linear or inputs.finish is not None or type(rows) is not Tensor:
        return False
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:  # such as those that move weights
        return False
    weight, numbers = head.weight, (torch.float32, torch.float64)
    same = weight.dtype == rows.dtype == inputs.first.dtype and weight.device == rows.device
    return same and rows.dtype in numbers and weight.shape == (len(inputs.first), rows.shape[-1])
