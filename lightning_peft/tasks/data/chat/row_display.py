"""``display_row`` writes a row for people: its text in parts, with and without a label."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from lightning_peft.tasks.data.encoding.collator import IGNORED
from lightning_peft.tasks.data.encoding.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def display_row(tokenizer: PreTrainedTokenizerBase, example: Example, name: str) -> str:
    """The lines that show an encoded row.

    Args:
        tokenizer: That wrote it.
        example: With labels.
        name: What the row is called.
    """
    labelled = sum(label != IGNORED for label in example["labels"])
    head = f"{name}: {len(example['input_ids'])} tokens, the loss counts {labelled} (marked +)"
    return "\n".join([head, *_parts(tokenizer, example)])


def _parts(tokenizer: PreTrainedTokenizerBase, example: Example) -> Iterator[str]:
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    for counts, part in groupby(pairs, lambda pair: pair[1] != IGNORED):
        ids = [token for token, _ in part]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield f"  {'+' if counts else ' '} {len(ids):5}  {text!r}"
