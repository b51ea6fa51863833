"""What ``CausalLM`` gives to transformers' ``generate``: batches of prompts, and where texts end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.tasks.chat_template import chat_ids, end_token, render_chat
from lightning_peft.tasks.data.chat.chat_turns import read_turns
from lightning_peft.tasks.data.encoding.collator import Collator
from lightning_peft.tasks.pretrained import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generation_settings(network: Any, tokenizer: PreTrainedTokenizerBase, is_chosen: bool) -> dict[str, Any]:
    """Settings of a model's own, completed by those of its tokenizer.

    A text ends with any end token of the model's generation settings, the tokenizer's, and the one that the chat
    template writes after a turn. Without settings of its own, a model takes the most likely token.

    Args:
        network: Model of transformers.
        tokenizer: Its tokenizer.
        is_chosen: Whether the model's generation settings are someone's choice, not defaults of an architecture.
    """
    own = network.generation_config if is_chosen else None
    ends = getattr(own, "eos_token_id", None)
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, end_token(tokenizer)]
    pad = getattr(own, "pad_token_id", None)
    settings = {
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)) or None,
        "pad_token_id": tokenizer.pad_token_id if pad is None else pad,
    }
    return settings if getattr(own, "do_sample", False) else settings | {"do_sample": False}


def prompt_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Tensor]:
    """The batch of some texts that are to be continued."""
    return _batch(tokenizer, prompt_ids(tokenizer, texts))


def chat_batch(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> dict[str, Tensor]:
    """The batch of one conversation, with the assistant's next turn begun.

    Args:
        tokenizer: With a chat template.
        messages: Turns, with ``role`` and ``content``.
        tools: JSON schemas of functions that the assistant may call.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The tokenizer has no chat template, which says how turns are written. Give CausalLM the tokenizer of a "
            "chat model, or the folder of an adapter that was trained with one."
        )
    text = render_chat(tokenizer, read_turns([dict(message) for message in messages]), tools, prompt=True)
    return _batch(tokenizer, [chat_ids(tokenizer, text)])


def _batch(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> dict[str, Tensor]:
    return Collator(tokenizer)([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with all padding on the left."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    return {name: value.gather(1, order) for name, value in batch.items()}
