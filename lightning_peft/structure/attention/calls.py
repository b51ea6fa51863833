"""``AttentionCalls`` and ``call_changed``: the attention calls of a module, and how an adapter changes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.multi_head_attention import multi_head_attention
from ...ops.torch_api import is_recorded
from .batched_products import is_product_of_batches
from .interface import InterfaceMode, change_interface_call, interface_attention, reach_interface
from .products import AttentionProducts
from .thread_changes import call_with_change


class AttentionCalls(InterfaceMode):
    """Context that calls ``change(attend, query, key, value, ...)`` in place of each attention function.

    Attention functions are ``scaled_dot_product_attention``, also inside torch's ``nn.MultiheadAttention``, where masks
    are additive; the functions of transformers' attention interface; and a softmax between two products. All of them
    are called as the first one is: with keys and values (batch, heads, tokens, size), ``attn_mask`` and ``scale``.
    Enter it as ``calls = AttentionCalls(change)`` and ``with calls:``; ``with AttentionCalls(change) as calls:`` loses
    the object under ``torch.compile``.

    Args:
        change: Function of the attention function and of its arguments, which tell heads and sizes.
        host: Attention module, whose number of heads says how to read products of (batch * heads, tokens, size).
    """

    def __init__(self, change: Callable[..., Tensor], host: nn.Module | None = None) -> None:
        super().__init__()
        reach_interface()
        self.change = change
        self.start(host)

    def start(self, host: nn.Module | None) -> None:
        """Begin with the calls of another module."""
        self.host, self.seen = host, False
        self.products: AttentionProducts | None = None  # most modules reach an attention function before any product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen = True
            return self.change(func, *args, **kwargs)
        if func is interface_attention:
            self.seen = True
            return change_interface_call(self.change, *args, **kwargs)
        if func is F.multi_head_attention_forward:  # calls inside it do not reach this mode
            self.seen = True
            attend = functools.partial(self.change, F.scaled_dot_product_attention)
            return multi_head_attention(attend, *args, **kwargs)
        if self.products is None:
            if self.seen or not is_product_of_batches(func, args, kwargs):
                return func(*args, **kwargs)  # as in linear layers, which under compilation allow no side effects
            self.products = AttentionProducts(self.change, self.host)
        output = self.products(func, args, kwargs)
        self.seen = self.seen or self.products.seen
        return output


def call_changed(
    change: Callable[..., Tensor],
    host: nn.Module,
    by_interface: bool,
    inner: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return ``inner(*args, **kwargs)``, the call of an attention module, whose attention is changed.

    Args:
        change: Function of the attention function and its arguments; see ``AttentionCalls``.
        host: Attention module.
        by_interface: Whether it reaches attention through transformers' interface alone, as ``asks_interface`` found.
        inner: Its call.
        *args: Arguments of the call.
        **kwargs: The same by name.

    Raises:
        RuntimeError: The host did not call attention, so that the change had no effect.
    """
    # Compiled code and traces see the operations of the host anyway, and must hold no state of Python.
    if by_interface and not is_recorded():
        reach_interface()
        output, seen = call_with_change(change, inner, args, kwargs)
    else:
        calls = AttentionCalls(change, host)
        with calls:
            output = inner(*args, **kwargs)
        seen = calls.seen
    if not seen:
        raise RuntimeError(
            f"{type(host).__name__} did not call attention that can be changed, so its adapter has no effect: neither "
            f"scaled_dot_product_attention, nor transformers' attention interface, nor a softmax of scaled and masked "
            f"scores between two products. Load the model with attn_implementation='sdpa' or 'eager' (in timm: with "
            f"fused_attn), do not ask for attention weights, or choose other targets."
        )
    return output
