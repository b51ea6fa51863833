"""``ChatEncoder`` turns a conversation into tokens with labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lightning_peft.tasks.chat_template import ChatError, chat_ids, end_of_turn, own_tokens, render_chat
from lightning_peft.tasks.data.chat.chat_rows import Conversation, refuse
from lightning_peft.tasks.data.chat.chat_spans import assistant_spans
from lightning_peft.tasks.data.chat.chat_turns import Turn
from lightning_peft.tasks.data.chat.span_tokens import span_tokens
from lightning_peft.tasks.data.encoding.collator import IGNORED
from lightning_peft.tasks.data.encoding.examples import Example
from lightning_peft.tasks.data.reading.tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loss = Literal["assistant", "all", "last"]
LongRows = Literal["cut", "drop"]


@dataclass(frozen=True)
class ChatEncoder:
    """Writes conversations by the chat template, tokenises each once, and labels what the loss counts.

    Args:
        tokenizer: With a chat template.
        loss: On the assistant's turns, on all tokens, or on the assistant's last turn.
        max_length: Longest row in tokens.
        long_rows: Whether longer rows lose their last turns, or are left out.
    """

    tokenizer: PreTrainedTokenizerBase
    loss: Loss
    max_length: int
    long_rows: LongRows

    @cached_property
    def end(self) -> str:
        """What the template writes after an assistant's turn; empty where it writes nothing."""
        return end_of_turn(self.tokenizer)

    @cached_property
    def ends(self) -> list[str]:
        """That, and what else it may write there, if it writes anything."""
        return [self.end, *(own_tokens(self.tokenizer) if self.end else [])]

    def prompt(self, row: Conversation) -> list[int]:
        """The tokens of a conversation up to where the assistant is to answer its last turn of another role."""
        last = max((i for i, turn in enumerate(row.turns) if turn["role"] != "assistant"), default=-1)
        if last < 0:
            raise ChatError("there is no turn to answer, which is one of another role than 'assistant'")
        return chat_ids(self.tokenizer, render_chat(self.tokenizer, row.turns[: last + 1], row.tools, prompt=True))

    def __call__(self, row: Conversation) -> Example | None:
        """Token ids, attention mask and labels of a row, and whether it was cut; None if it does not fit.

        Args:
            row: The conversation.

        Raises:
            ChatError: It has no turn of the assistant, or the template refuses it.
        """
        answers = [i for i, turn in enumerate(row.turns) if turn["role"] == "assistant" and i >= row.first]
        if not answers:
            raise ChatError("there is no turn of the role 'assistant' to learn from")
        first = answers[-1] if self.loss == "last" else answers[0]
        count = len(row.turns) if self.loss == "all" else answers[-1] + 1
        example, ends = self._encoded(row, first, count)
        if len(example["input_ids"]) <= self.max_length:
            return example | {"cut": False}
        fitting = [turn for turn, tokens in ends if tokens <= self.max_length and turn + 1 < count]
        for turn in reversed(fitting if self.long_rows == "cut" else []):
            example, _ = self._encoded(row, first, turn + 1)
            if len(example["input_ids"]) <= self.max_length:
                return example | {"cut": True}
        return None

    def _encoded(self, row: Conversation, first: int, count: int) -> tuple[Example, list[tuple[int, int]]]:
        """Return the example of some turns, and the number of each of the assistant's with where its tokens end."""

        def write(turns: Sequence[Turn], prompt: bool) -> str:
            return render_chat(self.tokenizer, turns, row.tools, prompt=prompt)

        turns = row.turns[:count]
        text, spans = assistant_spans(write, turns, first, self.ends)
        ids, places = span_tokens(self.tokenizer, text, spans)
        labels = list(ids) if self.loss == "all" else self._labels(ids, places, self._marked(turns, row.tools, ids))
        if not self.end and turns[-1]["role"] == "assistant":
            ids, labels = [*ids, self._eos()], [*labels, self._eos()]
        example = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        return example, [(span.turn, stop) for span, (_, stop) in zip(spans, places, strict=True)]

    def _labels(self, ids: list[int], places: Sequence[tuple[int, int]], marked: list[int] | None) -> list[int]:
        """Return the tokens of the assistant's turns, of those what the template marks, and -100 elsewhere."""
        labels = [IGNORED] * len(ids)
        for start, stop in places:
            chosen = [index for index in range(start, stop) if marked is None or marked[index]]
            if self.end and chosen and chosen[-1] == stop - 2:
                chosen.append(stop - 1)  # the end token, where marks leave it out
            for index in chosen:
                labels[index] = ids[index]
        return labels

    def _marked(self, turns: Sequence[Turn], tools: Any, ids: list[int]) -> list[int] | None:
        """Return which tokens the template marks as the assistant's; None where it marks none."""
        template = self.tokenizer.get_chat_template(tools=tools)
        if "generation" not in template or "endgeneration" not in template:
            return None
        marked: Any = self.tokenizer.apply_chat_template(
            list(turns), tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        mask: list[int] = marked["assistant_masks"]
        return mask if len(mask) == len(ids) else None

    def _eos(self) -> int:
        eos: int | None = self.tokenizer.eos_token_id
        if eos is None:
            raise ChatError(
                "neither the chat template nor the tokenizer has an end token, so a model could not learn where an "
                "answer ends; set eos_token in the tokenizer's tokenizer_config.json"
            )
        return eos


def encode_each(table: Table, rows: Sequence[Conversation], encode: Callable[[Conversation], Any]) -> list[Any]:
    """What a function makes of each conversation; an error names the row.

    Args:
        table: Where the rows are from.
        rows: The conversations.
        encode: The function.
    """
    results = []
    for index, row in enumerate(rows):
        try:
            results.append(encode(row))
        except ChatError as error:
            refuse(table, index, f"{error}.")
    return results
