"""``span_tokens`` tokenises a text and tells which tokens the parts of it have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_peft.tasks.chat_template import ChatError, chat_ids
from lightning_peft.tasks.data.chat.chat_spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def span_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]
) -> tuple[list[int], list[tuple[int, int]]]:
    r"""The tokens of a text, and of each span the number of its first token and of the one after its last.

    The text is tokenised at once. Where a token would reach into a span from before it, as ``\n\n`` does where a
    header and an answer meet, the text is cut there: generation starts with the tokens of what comes before the span.

    Args:
        tokenizer: One that tells where its tokens stand.
        text: The text.
        spans: Parts of it, in order.

    Raises:
        ChatError: The tokenizer loses characters, so that nothing tells where the spans are.
    """
    whole = _Tokens(tokenizer, text)
    if all(whole.begins_at(span.start) for span in spans):
        return whole.ids, [(whole.before(span.start), whole.before(span.stop)) for span in spans]
    ids: list[int] = []
    places = []
    cuts = [0, *(span.start for span in spans), len(text)]
    for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        part = _Tokens(tokenizer, text[start:stop])
        if number:
            places.append((len(ids), len(ids) + part.before(spans[number - 1].stop - start)))
        ids += part.ids
    return ids, places


class _Tokens:
    """The tokens of a text, and where they stand in it.

    Args:
        tokenizer: One that tells this. One that loses characters tells it wrongly; then tokens are counted.
        text: The text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.tokenizer, self.text = tokenizer, text
        self.ids: list[int] = coded["input_ids"]
        self.places: list[tuple[int, int]] = coded["offset_mapping"]
        self.is_lossy = bool(self.places) and self.places[-1][1] < len(text.rstrip())

    def begins_at(self, position: int) -> bool:
        """Whether no token stands on both sides of a position."""
        if self.is_lossy:
            return self._counted(position) is not None
        return not any(start < position < stop for start, stop in self.places)

    def before(self, position: int) -> int:
        """How many tokens begin before a position."""
        if not self.is_lossy:
            return sum(start < position for start, _ in self.places)
        count = self._counted(position)
        if count is None:
            raise ChatError("the tokenizer loses characters, so it is not known which tokens a turn has")
        return count

    def _counted(self, position: int) -> int | None:
        ids = chat_ids(self.tokenizer, self.text[:position])
        return len(ids) if ids == self.ids[: len(ids)] else None
