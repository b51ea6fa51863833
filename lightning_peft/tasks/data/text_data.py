"""``TextDataModule``: tables of labelled text, one text or a pair per row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_peft.tasks.data.examples import Example
from lightning_peft.tasks.data.splits import Split, Splits
from lightning_peft.tasks.data.table_data import Padding, TableDataModule
from lightning_peft.tasks.data.tables import Table
from lightning_peft.tasks.messages import quoted

Classes = list[str] | list[int]


class TextDataModule(TableDataModule):
    """Rows of text with a label, from files, folders or the hub, as ``docs/data.md`` lists them.

    The labels of the train file, sorted, are the `classes`; checkpoints keep them, so that a prediction has names.

    Args:
        train: File to train on; its labels are the classes.
        validation: File to validate on. Without one, a share of the train file is held out.
        test: File to test on.
        predict: File to predict; it needs no labels.
        text: Column of the text, or a list of two columns for pairs of sentences.
        label: Column of the label: strings or whole numbers.
        model: The model whose tokenizer to use: a folder, package:name/folder, or a hub name; by default the one that
            is trained.
        tokenizer: Another tokenizer than the model's, in the same forms.
        max_length: Longest row in tokens; longer ones are cut.
        batch_size: Rows per batch.
        num_workers: Processes that build batches.
        limit_train: Train on the first rows only, for a quick trial.
        limit_validation: Validate on the first rows only.
        validation_fraction: Share of the train file to validate on when there is no validation file; 0 for none.
        padding: To the longest row of each batch, or all rows to max_length, which cache_frozen=True asks for.
        group_by_length: Whether rows of about the same length share a train batch, which leaves little padding.
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        text: str | list[str] = "text",
        label: str = "label",
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
        self.classes: Classes | None = None

    def ready(self, split: Split) -> bool:
        """Labels can be encoded once the classes are known, or can be read from the train file."""
        return split in ("train", "predict") or self.classes is not None or self.splits.has("train")

    def encode(self, split: Split, table: Table) -> list[Example]:
        """Token ids, attention mask and, unless it is to be predicted, the label's index of each row."""
        texts = [table.texts(column) for column in self.columns]
        labels = [] if split == "predict" else self._indices(table)
        tokens = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        examples = [{name: tokens[name][row] for name in tokens} for row in range(len(table))]
        for example, index in zip(examples, labels, strict=False):
            example["labels"] = index
        return examples

    def learn(self, split: Split) -> None:
        """Read the classes from the train file."""
        if split == "train" or (split != "predict" and self.classes is None):
            train = self.splits.file("train")
            self._agree(_classes(read_labels(train, self.label)), f"the train file {train.source!r}")

    def _indices(self, table: Table) -> list[int]:
        index = {str(name): position for position, name in enumerate(self.classes or ())}
        labels = read_labels(table, self.label)
        for position, label in enumerate(labels):
            if label not in index:
                raise ValueError(
                    f"Row {table.numbers[position]} of {table.source!r} has the label {label!r}, which the train file "
                    f"does not have. Known labels: {quoted(index)}. Correct the row, or add such rows to the train "
                    "file."
                )
        return [index[label] for label in labels]

    def _agree(self, classes: Classes, source: str) -> None:
        if self.classes not in (None, classes):
            raise ValueError(
                f"{source} has the classes {quoted(classes)}, but {quoted(self.classes or ())} are in use already. "
                "A trained classifier keeps its classes: use the train file and the checkpoint that belong together."
            )
        self.classes = classes

    def state_dict(self) -> dict[str, Any]:
        """The classes."""
        return {"classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the classes of a checkpoint.

        Args:
            state_dict: As `state_dict` returned it.

        Raises:
            ValueError: If the train file has others.
        """
        if state_dict["classes"] is not None:
            self._agree(state_dict["classes"], "The checkpoint")


def read_labels(table: Table, column: str) -> list[str]:
    """The labels of a table as text.

    Args:
        table: Its rows.
        column: Of strings or whole numbers.

    Raises:
        ValueError: If a row has none.
    """
    values = table.values(column)
    table.refuse(
        [i for i, value in enumerate(values) if not isinstance(value, (str, int)) or not str(value).strip()],
        f"Column {column!r} of {table.source!r} holds no string or whole number in {{rows}}. Give every row a label.",
    )
    return [str(value) for value in values]


def _classes(labels: Iterable[str]) -> Classes:
    """Whole numbers in order if all labels are, else strings in order: the same for a CSV and a JSONL file."""
    names = set(labels)
    if all(name.removeprefix("-").isdecimal() and str(int(name)) == name for name in names):
        return sorted(map(int, names))
    return sorted(names)
