"""``text_pieces`` cuts plain text into rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_peft.tasks.data.encoding.examples import Example
from lightning_peft.tasks.pretrained import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_pieces(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> Iterator[list[Example]]:
    """Yield the examples of each text, all of whose tokens have labels, its end token included.

    A piece begins with the token that the one before ended with, since the first token of a row is not predicted: so
    each token of a text is predicted once.

    Args:
        tokenizer: Whose start token, if it writes one, and end token stand around the text.
        texts: The texts; a blank one has no examples.
        max_length: Longest piece in tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    written = iter(prompt_ids(tokenizer, [text for text in texts if text.strip()]))
    for text in texts:
        ids = [*next(written), *end] if text.strip() else []
        step = max(1, max_length - 1)
        starts = range(0, max(1, len(ids) - 1), step) if ids else ()
        pieces = [ids[start : start + max_length] for start in starts]
        yield [{"input_ids": piece, "attention_mask": [1] * len(piece), "labels": piece} for piece in pieces]
