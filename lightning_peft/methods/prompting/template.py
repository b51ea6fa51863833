"""``Template``: rows of token ids from pseudo tokens, fields of an example, a mask and anchor words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

MASK = "mask"  # the field that stands for the tokenizer's mask token
PLACEHOLDER = -1  # the id of a pseudo token, which no vocabulary has
_PSEUDO = "\0"
_RUN = re.compile(r"(\s*(?:\0\s*)+)")
_PIECE = re.compile(r"\[P(?::(?P<count>[^\[\]]*))?\]|\{(?P<name>[^{}]*)\}|(?P<stray>\[P:|[{}])")


class Piece(NamedTuple):
    """Part of a template: pseudo tokens (with their number), a field or the mask (its name), or anchor words."""

    kind: Literal["pseudo", "field", "words"]
    value: str
    number: int = 0


@dataclass(frozen=True)
class Template:
    """Template of the rows of a prompt, such as ``[P:3] {subject} [P:3] {mask} .``.

    ``[P:n]`` stands for n pseudo tokens and ``[P]`` for one, ``{name}`` for a field of the example, ``{mask}`` for the
    tokenizer's mask token; everything else are anchor words. A call with a tokenizer and fields returns token ids, with
    the special tokens that the tokenizer adds. Words get the ids that they have in the row without pseudo tokens.

    Args:
        text: Template text.
        max_length: Largest number of tokens in a row, special tokens included; None for any number.
        shorten: Field whose end is cut off where a row is longer; the rest of the row is never cut.
        placeholder: Id of each pseudo token; ``PTuning`` has the same setting.

    Raises:
        ValueError: The text cannot be parsed (the message says where), or ``shorten`` is not one of its fields.

    Examples:
        >>> template = lp.Template("[P:3] {subject} [P] is in {mask} .")
        >>> template.pseudo_tokens, template.fields, template.masks
        (4, ['subject'], 1)
    """

    text: str
    max_length: int | None = None
    shorten: str | None = None
    placeholder: int = PLACEHOLDER

    def __post_init__(self) -> None:
        fields = self.fields
        if self.shorten is not None and self.shorten not in fields:
            raise ValueError(f"shorten={self.shorten!r} is no field of the template {self.text!r}; it has {fields}.")

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Parts of the text, in order."""
        return tuple(_parse(self.text))

    @property
    def pseudo_tokens(self) -> int:
        """Number of pseudo tokens in a row."""
        return sum(piece.number for piece in self.pieces)

    @property
    def fields(self) -> list[str]:
        """Names of the fields, the mask left out."""
        names = [piece.value for piece in self.pieces if piece.kind == "field"]
        return [name for name in dict.fromkeys(names) if name != MASK]

    @property
    def masks(self) -> int:
        """Number of masks in a row."""
        return sum(piece[:2] == ("field", MASK) for piece in self.pieces)

    def __call__(self, tokenizer: Any, /, **fields: str) -> list[int]:
        """Return the ids of a row.

        Args:
            tokenizer: A tokenizer of transformers.
            fields: Text for each field of the template.

        Raises:
            ValueError: Fields are missing or unknown, the tokenizer has no mask, or a row is too long.
        """
        if fields.keys() != set(self.fields):
            raise ValueError(f"The template {self.text!r} has the fields {self.fields}, got {sorted(fields)}.")
        if self.masks and tokenizer.mask_token is None:
            raise ValueError(f"The template {self.text!r} has a mask, and the tokenizer has none; use a masked model.")
        row = self._row(tokenizer, fields)
        if self.max_length is None or len(row) <= self.max_length:
            return row
        if self.shorten is None:
            raise ValueError(
                f"A row of the template {self.text!r} has {len(row)} tokens, more than max_length={self.max_length}; "
                "name the field to cut by shorten."
            )
        return self._shortened(tokenizer, fields, self.shorten, self.max_length)

    def answer(self, tokenizer: Any, text: str) -> list[int]:
        """Return the ids of a text in the position of the mask."""
        before = itertools.takewhile(lambda piece: piece[:2] != ("field", MASK), self.pieces)
        context = "".join({"words": piece.value, "field": "a", "pseudo": ""}[piece.kind] for piece in before)
        words = context.rstrip()
        return _split(tokenizer, [words, words + " " * (words not in ("", context)) + text])[1]

    def _row(self, tokenizer: Any, fields: Mapping[str, str]) -> list[int]:
        """Return the ids of a row of any length."""
        values = {**{name: value.replace(_PSEUDO, "") for name, value in fields.items()}, MASK: tokenizer.mask_token}
        words = {"words": lambda piece: piece.value, "field": lambda piece: values[piece.value]}
        words["pseudo"] = lambda piece: _PSEUDO * piece.number
        first, *rest = _RUN.split("".join(words[piece.kind](piece) for piece in self.pieces).strip())
        texts, counts = [first], [0]  # text up to each run of pseudo tokens, and the length of the run before it
        for run, text in zip(rest[::2], rest[1::2], strict=True):
            space = " " * bool(texts[-1] and text and run.strip(_PSEUDO))
            texts.append(texts[-1] + space + text)
            counts.append(run.count(_PSEUDO))
        before, after = _specials(tokenizer)
        runs = zip(counts, _split(tokenizer, texts), strict=True)
        return [*before, *(i for count, ids in runs for i in [*[self.placeholder] * count, *ids]), *after]

    def _shortened(self, tokenizer: Any, fields: Mapping[str, str], name: str, max_length: int) -> list[int]:
        """Return the ids of a row with as many characters of a field as fit into ``max_length`` tokens."""
        fits = self._row(tokenizer, {**fields, name: ""})
        if len(fits) > max_length:
            raise ValueError(
                f"A row of the template {self.text!r} has {len(fits)} tokens without {name!r}, more than "
                f"max_length={max_length}; raise it, or shorten another field."
            )
        low, high = 0, len(fields[name])
        while high - low > 1:
            middle = (low + high) // 2
            row = self._row(tokenizer, {**fields, name: fields[name][:middle]})
            if len(row) <= max_length:
                low, fits = middle, row
            else:
                high = middle
        return fits


def _parse(text: str) -> Iterator[Piece]:
    """Yield the pieces of a template; raise a ``ValueError`` that says where it cannot be parsed."""
    end = 0
    for match in _PIECE.finditer(text):
        if words := text[end : match.start()]:
            yield Piece("words", words)
        end = match.end()
        count, name = match["count"], match["name"]
        where = f"at character {match.start() + 1} of the template {text!r}"
        if match["stray"]:
            raise ValueError(f"{match['stray']!r} {where} is not closed or not opened; write [P:n] or {{name}}.")
        if name is not None:
            if not name.isidentifier():
                raise ValueError(f"{match[0]!r} {where} is no field; write a name such as {{text}}.")
            yield Piece("field", name)
        elif count is None or count.isdecimal() and int(count) > 0:
            yield Piece("pseudo", match[0], int(count or 1))
        else:
            raise ValueError(f"{match[0]!r} {where} has no number of pseudo tokens; write [P:n] with n from 1 on.")
    if words := text[end:]:
        yield Piece("words", words)


def _split(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the ids that each text adds to those of the text before it, with which it begins."""
    rows = [[], *tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    added = []
    for number, (before, row) in enumerate(itertools.pairwise(rows)):
        if row[: len(before)] != before:  # pseudo tokens split a word: its halves are encoded separately
            rest = texts[number][len(texts[number - 1]) :]
            row = [*before, *tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]]
        added.append(row[len(before) :])
    return added


def _specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer adds before and after a row."""
    row, bare = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    start = next(i for i in range(len(row)) if row[i : i + len(bare)] == bare)
    return row[:start], row[start + len(bare) :]
