"""``TableDataModule``: base class of DataModules that make padded batches from tables."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from lightning_peft.tasks.data.encoding.collator import Collator
from lightning_peft.tasks.data.encoding.encode_table import encode_table
from lightning_peft.tasks.data.encoding.examples import Example, Examples
from lightning_peft.tasks.data.encoding.length_groups import LengthGroupedBatchSampler
from lightning_peft.tasks.data.encoding.streaming import check_stream, stream_examples
from lightning_peft.tasks.data.reading.splits import Split, Splits
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.pretrained import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Padding = Literal["longest", "max_length"]

_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


def no_validation() -> list[DataLoader[Any]]:
    """Return no loaders, as settings say, and keep Lightning from warning that this may not be meant."""
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    return []


class PortableDataModule(LightningDataModule):
    """Data whose batches worker processes can make: the Trainer, with the model, does not go there with it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}


class TableDataModule(PortableDataModule, ABC):
    """Tokenises tables once and serves padded batches; a child says how a table becomes examples.

    Args:
        splits: The rows of each split.
        tokenizer: A reference as `lightning_peft.tasks.pretrained.locate` reads it.
        max_length: Longest row in tokens.
        batch_size: Rows per batch.
        num_workers: Processes that build batches.
        padding: To the longest row of each batch, or all rows to max_length, so that a row is the same in each batch.
        group_by_length: Whether rows of about the same length share a train batch, which leaves little padding.
        streaming: Whether train rows are read and tokenised as they come, so that a run starts at once and no file is
            too large. The Trainer needs max_steps.
    """

    padding_side: str | None = None
    # Settings and attributes that encoded rows do not depend on: which rows there are, and how they become batches.
    batching_settings: frozenset[str] = frozenset(
        {"train", "validation", "test", "predict", "splits", "tokenizer", "batch_size", "num_workers", "padding"}
        | {"limit_train", "limit_validation", "validation_fraction", "group_by_length", "streaming"}
    )

    def __init__(
        self,
        splits: Splits,
        tokenizer: str | None,
        max_length: int,
        batch_size: int,
        num_workers: int,
        padding: Padding = "longest",
        group_by_length: bool = True,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        if padding not in get_args(Padding):
            raise ValueError(f"Got padding={padding!r}, expected one of {', '.join(get_args(Padding))}.")
        for name, count in {"max_length": max_length, "batch_size": batch_size}.items():
            if count < 1:
                raise ValueError(f"Got {name}={count}, expected 1 or more.")
        self.splits = splits
        self.reference = tokenizer  # None: that of the model that the Trainer trains
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.padding = padding
        self.group_by_length = group_by_length
        self.streaming = streaming
        if streaming:
            splits.check_streaming()
        self._examples: dict[Split, Examples] = {}

    @abstractmethod
    def encode(self, split: Split, table: Table) -> list[Example]:
        """Token ids, attention mask and labels of each row; the split comes in parts, each with a thousand rows.

        Rows that cannot be used are left out. An example may say ``"cut": True`` where a part of its row did not fit:
        these are counted, and not passed on.
        """

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use."""
        trained = getattr(self.trainer, "lightning_module", None)
        reference = self.reference or getattr(trained, "hparams", {}).get("model")
        if reference is None:
            raise ValueError(
                "Got neither model nor tokenizer, and the module that is trained names no model either. Set "
                "data.tokenizer or data.model: the folder or name of the model whose tokenizer to use."
            )
        tokenizer = build_tokenizer(reference, self.padding_side)
        if self.max_length > tokenizer.model_max_length:
            raise ValueError(
                f"Got max_length={self.max_length}, but the model of {reference!r} takes at most "
                f"{tokenizer.model_max_length} tokens. Lower max_length."
            )
        return tokenizer

    def setup(self, stage: str) -> None:
        """Read and tokenise what the stage needs, unless the labels' meaning is still to come from a checkpoint."""
        for split in _SPLITS[stage]:
            if split == "train" and self.streaming:
                check_stream(self)
                continue
            optional = stage == "fit" and split == "validation" and not self.splits.has(split)
            if self.ready(split) and not optional:
                self.examples(split)

    def ready(self, split: Split) -> bool:
        """Whether a split can be encoded before a checkpoint is loaded."""
        return True

    def learn(self, split: Split) -> None:
        """Learn what `encode` needs to know beside the rows themselves, such as the classes.

        It is called before each split is encoded, also if its encoded rows are kept from an earlier run and ``encode``
        is not called. What is learnt belongs into ``state_dict``.
        """

    def examples(self, split: Split) -> Examples:
        """The encoded rows of a split."""
        if split not in self._examples:
            if split == "train" and self.streaming:
                raise ValueError("Got streaming=True, but all train rows are asked for. Set streaming=False here.")
            table = self.splits.rows(split)
            self.learn(split)
            self._examples[split] = encode_table(self, split, table)
        return self._examples[split]

    def lengths(self, examples: Examples) -> list[int]:
        """The number of tokens of each row, by which train rows are grouped."""
        return examples.lengths("input_ids")

    def longest(self) -> int:
        """The number of tokens of the longest row that was encoded, padding to max_length included."""
        if self.padding == "max_length":
            return self.max_length
        return max((max(self.lengths(examples)) for examples in self._examples.values()), default=0)

    def dropped(self, split: Split, source: str, count: int, rows: int) -> str:
        """The sentence about rows that were left out."""
        where = f"{count} of {rows} {self.rows_of(split, source)}"
        return f"{where} do not fit max_length={self.max_length} and are left out."

    def rows_of(self, split: Split, source: str) -> str:
        """What messages call the rows of a split: those that are held out for validation are a part of a file."""
        held_out = split == "validation" and self.splits.files["validation"] is None
        return f"rows of {source!r}" + " that are held out for validation" * held_out

    def was_cut(self, source: str, count: int, rows: int) -> str:
        """The sentence about rows of which a part did not fit."""
        limit = f"max_length={self.max_length}"
        return f"{count} of {rows} rows of {source!r} are cut at {limit}. Raise it to keep more of them."

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """The batch of some examples, by `Collator`; a child whose examples are of another form overrides it."""
        length = self.max_length if self.padding == "max_length" else None
        return Collator(self.tokenizer, length)(examples)

    def train_dataloader(self) -> DataLoader[Example]:
        """Shuffled batches of the train rows."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """Batches of the validation rows; an empty list without any."""
        return self._loader("validation") if self.splits.has("validation") else no_validation()

    def test_dataloader(self) -> DataLoader[Example]:
        """Batches of the test rows."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Example]:
        """Batches of the rows to predict, without labels."""
        return self._loader("predict")

    def _loader(self, split: Split) -> DataLoader[Example]:
        shared: dict[str, Any] = {"num_workers": self.num_workers, "collate_fn": self.collate}
        if split == "train" and self.streaming:  # workers start anew in each pass: their seeds decide the order of rows
            return DataLoader(stream_examples(self), batch_size=self.batch_size, **shared)
        shared["persistent_workers"] = self.num_workers > 0
        examples = self.examples(split)
        if split == "train" and self.group_by_length and self.padding == "longest":
            groups = LengthGroupedBatchSampler(RandomSampler(examples), self.batch_size, False, self.lengths(examples))
            return DataLoader(examples, batch_sampler=groups, **shared)
        return DataLoader(examples, batch_size=self.batch_size, shuffle=split == "train", **shared)
