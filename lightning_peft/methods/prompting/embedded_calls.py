"""``call_embedded``: a backbone is called with embeddings that contain virtual tokens, through embeddings or ids."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor

from ...core.adapter import Call
from ...core.method import check_setting

Change = Callable[[Tensor], Tensor]  # embeddings of the tokens of a call -> the same with virtual tokens


def embedded(host: Any, call: dict[str, Any], hidden: Tensor | None = None) -> Tensor:
    """Return the embeddings of a call's tokens and remove ``input_ids`` from it; those of ``hidden`` are arbitrary.

    For RoBERTa and similar models, which compute positions from ids, ``position_ids`` are added to the call.
    """
    embeddings: Tensor | None = call.get("inputs_embeds")
    if embeddings is not None:
        return embeddings
    ids = call.pop("input_ids")
    padding = getattr(getattr(getattr(host, "embeddings", None), "position_embeddings", None), "padding_idx", None)
    if padding is not None and call.get("position_ids") is None:
        is_token = ids.ne(padding)
        call["position_ids"] = is_token.cumsum(1) * is_token + padding
    return cast(Tensor, host.get_input_embeddings()(ids if hidden is None else ids.masked_fill(hidden, 0)))


def call_with_ids(host: Any, inner: Call, call: Mapping[str, Any], change: Change) -> Any:
    """Call a backbone that needs ``input_ids``, and change what its input embeddings return for them.

    Args:
        host: The backbone.
        inner: Call of the host without the adapter.
        call: Arguments by name, with some id for each virtual token among ``input_ids``.
        change: Function of the embeddings of these ids.

    Raises:
        ValueError: Another prompt changes the embeddings of the same call.
        TypeError: The backbone embeds its ids by another module than its ``get_input_embeddings`` returns.
    """
    table, ids = host.get_input_embeddings(), call["input_ids"]
    substitution = _Substitution(ids, change)
    others = [hook for hook in table._forward_hooks.values() if isinstance(hook, _Substitution)]
    check_setting(
        all(hook.thread != substitution.thread for hook in others),
        "method",
        f"a second prompt for {type(host).__name__}",
        "one alone, since this model also reads the ids of its tokens",
    )
    handle = table.register_forward_hook(substitution)
    try:
        output = inner(**call)
    finally:
        handle.remove()
    if not substitution.happened:
        raise TypeError(
            f"{type(host).__name__} did not embed its input_ids by the {type(table).__name__} that its "
            f"get_input_embeddings returns, so that no virtual token entered; use PrefixTuning, or give targets."
        )
    return output


class _Substitution:
    """Forward hook that changes the output of input embeddings, in the thread that created it.

    Args:
        ids: Ids whose embeddings are changed; calls with others are left alone.
        change: Function of these embeddings.
    """

    def __init__(self, ids: Tensor, change: Change) -> None:
        self.shape, self.change, self.thread, self.happened = ids.shape, change, threading.get_ident(), False

    def __call__(self, table: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if threading.get_ident() != self.thread or output.shape[:-1] != self.shape:
            return output
        self.happened = True
        return self.change(output)
