"""``prepend_to_backbone``: virtual tokens enter the call of a transformers backbone, and leave its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.adapter import Call
from ...structure.cached_tokens import caches
from ...structure.token_arguments import token_types
from ...structure.transformers_api import POSITIONS
from .call_checks import check_extendable, check_length, is_continued
from .embedded_calls import call_with_ids, embedded
from .hidden_tokens import hide_virtual_tokens, show_virtual_tokens
from .strip_outputs import pooler_of, strip_virtual_tokens
from .virtual_tokens import Insertion

_NOT_OF_TOKENS = (
    "pixel",
    "image",
    "video",
    "audio",
    "input_features",
    "feature",
    "encoder_",
    "head_mask",
    "inputs_embeds",
)


def prepend_to_backbone(
    host: Any,
    inner: Call,
    call: Mapping[str, Any],
    virtual: Callable[[], Tensor],
    length: int,
    keep: bool = False,
    stand_in: int | None = None,
) -> Any:
    """Call a backbone with virtual tokens inserted; its output has the positions of its input.

    In calls with a cache, which holds the virtual tokens already, only masks and positions are changed.

    Args:
        host: Module that takes ``input_ids`` or ``inputs_embeds``, and ``attention_mask``.
        inner: Call of the host without the adapter.
        call: Arguments by name.
        virtual: Computes virtual tokens (p, features), or (batch, p, features) with a separate prompt for each row.
        length: Their number p.
        keep: Whether the output keeps the virtual tokens, as that of an encoder does for cross-attention.
        stand_in: Id of virtual tokens for a host that needs ``input_ids``; None where embeddings tell it all.
    """
    call = dict(call)
    passed_in = caches(call.values())
    show_virtual_tokens(passed_in)
    try:
        output = _call_with_prompt(host, inner, call, virtual, length, keep, stand_in)
    finally:
        hide_virtual_tokens(passed_in, length)
    made = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    # Compared by `is`: compiled code would be tied to the very tensors of its first call by their ids.
    hide_virtual_tokens([new for new in caches(made) if not any(new is cache for cache in passed_in)], length)
    return output


def _call_with_prompt(
    host: Any,
    inner: Call,
    arguments: Mapping[str, Any],
    virtual: Callable[[], Tensor],
    length: int,
    keep: bool,
    stand_in: int | None,
) -> Any:
    """Return what ``prepend_to_backbone`` returns, with caches that count virtual tokens."""
    call = dict(arguments)
    mask = call.get("attention_mask")
    check_extendable(host, call, length)
    where, continued = Insertion(length, mask), is_continued(host, call, length)
    if mask is not None:
        call["attention_mask"] = where.mask(mask)
    if continued:
        return inner(**call | {name: call[name] + length for name in POSITIONS if call.get(name) is not None})
    tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
    check_length(host, length + tokens.shape[1])

    prompt = virtual()

    def insert(embeddings: Tensor) -> Tensor:
        return where.insert(prompt.to(embeddings.dtype).expand(embeddings.shape[0], -1, -1), embeddings)

    if call.get("inputs_embeds") is None and stand_in is not None:
        call["input_ids"] = where.insert(tokens.new_full((len(tokens), length), stand_in), tokens)
        _extend_arguments(host, call, where, tokens)
        output = call_with_ids(host, inner, call, lambda embeddings: insert(where.remove(embeddings)))
    else:
        call["inputs_embeds"] = insert(embedded(host, call))
        _extend_arguments(host, call, where, tokens)
        output = inner(**call)
    _check_output(host, output, (len(tokens), length + tokens.shape[1]))
    return output if keep else strip_virtual_tokens(output, where.remove, pooler_of(host))


def _extend_arguments(host: Any, call: dict[str, Any], where: Insertion, tokens: Tensor) -> None:
    """Extend what else a call says about each of its tokens; raise for what cannot be extended."""
    if call.get("cache_position") is not None:
        call["cache_position"] = torch.arange(where.length + tokens.shape[1], device=tokens.device)
    if isinstance(call.get("seq_len"), int):  # ModernBERT before transformers 5
        call["seq_len"] += where.length
    for name, value in call.items():
        if not isinstance(value, Tensor) or name in ("input_ids", "attention_mask", "cache_position"):
            continue
        if name in POSITIONS:
            call[name] = where.positions(value)
        elif (fill := token_types(name, value)) is not None:
            call[name] = where.insert(fill.expand(-1, where.length, *value.shape[2:]), value)
        elif value.shape[:2] == tokens.shape[:2] and not name.startswith(_NOT_OF_TOKENS):
            raise ValueError(
                f"{type(host).__name__} was given {name} {tuple(value.shape)}, one for each token, and what virtual "
                f"tokens would have there is not known; leave it out, or use PrefixTuning, which adds no tokens."
            )


def _check_output(host: Any, output: Any, shape: tuple[int, int]) -> None:
    """Raise where an output has other positions than the tokens (images before them), or positions of unknown name."""
    named = output if isinstance(output, Mapping) else {"last_hidden_state": output[0]}
    named = {"last_hidden_state": output} if isinstance(output, Tensor) else named
    if (hidden := named.get("last_hidden_state")) is not None:
        wrong = {"last_hidden_state": hidden} if hidden.shape[:2] != shape else {}
    else:
        tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
        wrong = {name: x for name, x in tensors.items() if x.dim() == 3 and x.shape[:2] == shape}
    if wrong:
        name, x = next(iter(wrong.items()))
        raise TypeError(
            f"{type(host).__name__} returned {name} of {tuple(x.shape)} for {shape} tokens, virtual ones included, and "
            f"it is not known where they are in it; use PrefixTuning or LoRA, or give targets."
        )
