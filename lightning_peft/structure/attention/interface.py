"""``interface_attention``: calls of transformers' attention interface, made visible to modes that change attention.

Every attention module of transformers asks the interface for a function (eager with a softcap or sinks, flex, or what
a user registered) and calls it. While a change is under way, as during the call of an adapted attention module, the
interface returns ``interface_attention`` of that function instead, which makes the change: that of the thread (see
``thread_changes.py``) or of an ``InterfaceMode``. Both belong to their thread, so other threads and models see the
functions themselves, and no configuration is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function

from ...ops.torch_api import function_modes
from ..transformers_api import SDPA_FUNCTION, attention_interface
from .sdpa_call import change_sdpa_call, is_sdpa_call
from .thread_changes import thread

_WITHOUT_TORCHS = ("eager", "flex", "flash")  # functions that do not call scaled_dot_product_attention
_NO_PREFIX = ("flash", "paged")  # functions that find the end of the text, or the cache, from the number of keys


class InterfaceMode(TorchFunctionMode):
    """Function mode that sees calls of ``interface_attention``, in place of what happens inside of them."""


def interface_attention(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``function(*args, **kwargs)``, an attention function of the interface, with the changes under way."""
    mine = None if torch.compiler.is_dynamo_compiling() else thread.change
    if mine is not None:
        mine.seen, thread.change = True, mine.outer  # which the calls of attention in this one have
        try:
            if is_sdpa_call(function, kwargs):
                return change_sdpa_call(mine.change, partial(interface_attention, function), *args, **kwargs)
            return change_interface_call(mine.change, function, *args, **kwargs)
        finally:
            thread.change = mine
    if _is_seen():
        return handle_torch_function(interface_attention, (), function, *args, **kwargs)
    return function(*args, **kwargs)


def _is_seen() -> bool:
    return any(isinstance(mode, InterfaceMode) for mode in function_modes())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def reach_interface() -> None:
    """Let the interface return ``interface_attention`` while a change is under way; done once per process.

    For modes, the function that calls ``scaled_dot_product_attention`` is left as it is, since they see that call.
    """
    interface: Any = attention_interface()
    if interface is None or interface.get_interface.__module__ == __name__:
        return
    original = interface.get_interface

    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function: Callable[..., Any] = original(self, attn_implementation, default)
        by_thread = not torch.compiler.is_dynamo_compiling() and thread.change is not None
        if by_thread or (_is_seen() and _name_of(function) != SDPA_FUNCTION):
            return partial(interface_attention, function)
        return function

    interface.get_interface = get_interface


def change_interface_call(
    change: Callable[..., Tensor],
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **settings: Any,
) -> tuple[Tensor, Any]:
    """Return (output, weights) of an attention function after ``change``, which sees it as it sees torch's.

    Args:
        change: Function of the attention function and its arguments; see ``AttentionCalls``.
        function: Attention function: masks are as it was given them, and its output is (batch, tokens, heads, size).
        module: Attention module, which the function reads.
        query: Queries (batch, heads, tokens, size).
        key: Keys, with fewer heads where these are grouped.
        value: Values.
        attention_mask: Mask of any kind that the function takes; None means what it means to the function.
        **settings: Further arguments of the function, such as ``scaling``, ``softcap`` and ``position_bias``.
    """
    if attention_mask is None and not _name_of(function).startswith(_WITHOUT_TORCHS):
        # Without a mask, what calls torch's function is causal there, and cuts keys off before.
        calls = _TorchCalls(change)
        arguments = (module, query, key, value, attention_mask)
        result: tuple[Tensor, Any] = interface_attention(partial(_call_inside, calls, function), *arguments, **settings)
        if calls.seen:
            return result
    weights: list[Any] = []
    own = {name: settings.pop(name) for name in ("is_causal",) if name in settings}

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *_: Any, **rest: Any) -> Tensor:
        if key.shape[-2] != keys:
            _check_takes_more_keys(function, module)
        if "scale" in rest:
            rest["scaling"] = rest.pop("scale")
        output, found = interface_attention(function, module, query, key, value, mask, **(rest | own))
        weights.append(found)
        return output.transpose(1, 2)  # type: ignore[no-any-return]

    keys = key.shape[-2]
    if "scaling" in settings:
        settings["scale"] = settings.pop("scaling")
    output = change(attend, query, key, value, attention_mask, **settings)
    return output.transpose(1, 2), weights[-1]


class _TorchCalls(TorchFunctionMode):
    """Context in which ``scaled_dot_product_attention`` is changed."""

    def __init__(self, change: Callable[..., Tensor]) -> None:
        super().__init__()
        self.change, self.seen = change, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen = True
            return self.change(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _call_inside(calls: _TorchCalls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with calls:
        return function(*args, **kwargs)


def takes_more_keys(implementation: str) -> bool:
    """Return whether keys can be added to the calls of an attention implementation, or function, of this name."""
    return not any(kind in implementation for kind in _NO_PREFIX)


def _check_takes_more_keys(function: Callable[..., Any], module: nn.Module) -> None:
    if not takes_more_keys(_name_of(function)):
        raise RuntimeError(
            f"{type(module).__name__} calls {_name_of(function)}, whose windows, packed rows and cache would be wrong "
            f"with added keys; load the model with attn_implementation='sdpa', 'eager' or 'flex_attention'."
        )


def _name_of(function: Any) -> str:
    while isinstance(function, partial):
        function = function.args[1] if function.func is _call_inside else function.func
    return str(getattr(function, "__name__", type(function).__name__))
