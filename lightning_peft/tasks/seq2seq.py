"""``Seq2Seq``: a LightningModule over a transformers model with an encoder and a decoder that turns text into text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.core.eval_mode import evaluating
from lightning_peft.losses.next_token_loss import aligned, next_token, next_token_logits
from lightning_peft.tasks.data.encoding.collator import IGNORED
from lightning_peft.tasks.data.seq2seq_data import REFERENCES
from lightning_peft.tasks.module import TaskModule
from lightning_peft.tasks.optimization import check_optimization
from lightning_peft.tasks.pretrained import build_model, build_tokenizer
from lightning_peft.tasks.seq2seq_checks import check_data, check_has_encoder
from lightning_peft.tasks.text_metrics import TextMetrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Seq2Seq(TaskModule):
    """Writes a text for each text it reads, as T5, BART, mBART, Marian and Pegasus do; logs the loss.

    Validation and test also generate: ``val_rouge1``, ``val_rouge2``, ``val_rougeL`` (F-measures, without stemming) and
    ``val_bleu`` (sacreBLEU's) compare what was written with the targets as they stand in the table, from 0 to 1. Their
    losses are means over tokens of targets, whatever the batches. Give exactly one of ``model`` and ``config``; the
    network is built in train mode.

    Args:
        model: Pretrained model: a folder, package:name/folder in an installed Python package, or a hub name.
        config: Settings of a model with random weights, with its model_type; or a config.json, or its folder.
        tokenizer: Where generate finds its tokenizer, in the same forms; by default the data's or the model's.
        generate_in_validation: Whether validation and test generate texts; without, they only have a loss.
        max_new_tokens: Longest text to generate in tokens; null for what the model's generation_config says.
        num_beams: Beams of the search; null for what the model's generation_config says.
        learning_rate: Highest learning rate.
        weight_decay: Decoupled weight decay of AdamW.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What the learning rate does after the warm-up.
        dtype: Data type of the weights; auto keeps that of the pretrained file. Adapters are in float32 in any case.

    Examples:
        >>> from lightning_peft.tasks import Seq2Seq
        >>> sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        >>> module = Seq2Seq(config={"model_type": "t5", "vocab_size": 32, **sizes})
        >>> module(**module.sample_batch(2, 16)).shape
        torch.Size([2, 16, 32])
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | str | None = None,
        tokenizer: str | None = None,
        generate_in_validation: bool = True,
        max_new_tokens: int | None = 128,
        num_beams: int | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.06,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    ) -> None:
        super().__init__(MetricCollection({"loss": MeanMetric()}))
        check_optimization(learning_rate, weight_decay, warmup_fraction)
        check_has_encoder(model, config)
        self.save_hyperparameters()
        self.network = build_model("AutoModelForSeq2SeqLM", model, config, dtype)
        _start_as_padding(self.network)
        self.val_text, self.test_text = TextMetrics(), TextMetrics()
        self.generation: dict[str, int] = {}  # what the data asks of generate

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of ``generate``, loaded on first use."""
        reference = self.hparams["tokenizer"] or self.hparams["model"]
        if reference is None:
            raise ValueError("Got neither model nor tokenizer, so text cannot be read. Give Seq2Seq a tokenizer.")
        return build_tokenizer(reference, padding_side="right")

    def setup(self, stage: str) -> None:
        """Take the tokenizer of the data, unless one was named, and check that the data fits the model."""
        for data in self.data_of_tasks():
            tokenizer = getattr(data, "tokenizer", None)
            if tokenizer is not None:
                check_data(self.network, tokenizer, data)
                if self.hparams["tokenizer"] is None:
                    self.tokenizer = tokenizer
            self.generation = getattr(data, "generation", {})

    def forward(self, **batch: Tensor) -> Tensor:
        """Logits of each token of the targets.

        Args:
            batch: ``input_ids``, ``attention_mask``, ``labels`` with -100 at padding, and ``task_ids`` where adapters
                hold several tasks; anything else is ignored.

        Shape:
            (batch, tokens of targets, vocabulary)
        """
        inputs, _ = aligned(self.network, _with_labels(batch))
        with self.own_tasks(batch):
            logits: Tensor = self.network(**inputs).logits
        return logits

    def sample_batch(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """A batch of this shape, whose targets have as many tokens as its sources."""
        batch = super().sample_batch(rows, tokens)
        return {**batch, "labels": torch.ones_like(batch["input_ids"])}

    def labelled(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits (places, vocabulary) of each labelled token, and these tokens (places,)."""
        with self.own_tasks(batch):
            return next_token_logits(self.network, _with_labels(batch))

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Mean cross entropy of the tokens of the targets."""
        with self.own_tasks(batch):
            loss = next_token(self.network, _with_labels(batch))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, split: str, batch: dict[str, Any]) -> None:
        count = (batch["labels"] != IGNORED).sum(1)
        with self.own_tasks(batch):
            losses = next_token(self.network, _with_labels(batch), reduction="none")
        self.measure(split, batch, losses.sum(1) / count.clamp(min=1), count)
        if self.hparams["generate_in_validation"]:
            getattr(self, f"{split}_text").update(self.generate(batch), self._references(batch))

    def on_validation_epoch_end(self) -> None:
        """Log ROUGE and BLEU, and the losses of each task."""
        super().on_validation_epoch_end()
        self.log_dict(self.val_text.results("val_"), prog_bar=True)

    def on_test_epoch_end(self) -> None:
        """Log ROUGE and BLEU, and the losses of each task."""
        super().on_test_epoch_end()
        self.log_dict(self.test_text.results("test_"), prog_bar=True)

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> list[str]:
        """The text written for each source."""
        return self.generate(batch)

    @torch.no_grad()
    def generate(self, sources: str | list[str] | Mapping[str, Tensor], **settings: object) -> list[str]:
        """Write a text for each source, without dropout, as the model's generation_config says.

        Args:
            sources: Texts, with the prefix if the model was trained with one, or a batch with ``input_ids`` and
                ``attention_mask``, and ``task_ids`` where adapters hold several tasks.
            settings: Of transformers' ``generate``, such as ``num_beams=4``.
        """
        if not isinstance(sources, Mapping):
            texts = [sources] if isinstance(sources, str) else sources
            sources = dict(self.tokenizer(texts, padding=True, return_tensors="pt"))
        own = {name: self.hparams[name] for name in ("max_new_tokens", "num_beams")}
        defaults = {**{name: value for name, value in own.items() if value is not None}, **self.generation}
        inputs = {name: value.to(self.device) for name, value in _sources(sources).items()}
        network: Any = self.network
        with evaluating(network), self.own_tasks(sources):
            tokens = network.generate(**inputs, **(defaults | settings))
        written: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return written

    def _references(self, batch: dict[str, Any]) -> list[str]:
        if REFERENCES in batch:
            return list(batch[REFERENCES])
        rows = [row[row != IGNORED] for row in batch["labels"]]
        decoded: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return decoded


def _sources(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _with_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**_sources(batch), "labels": batch["labels"]}


def _start_as_padding(network: Any) -> None:
    """Let the decoder of a T5 start with the padding token where nothing says with which, as its authors did.

    Configurations of T5 that were written to files say so; those made here do not.
    """
    needs_start = hasattr(network, "_shift_right")
    if needs_start and getattr(network.config, "decoder_start_token_id", None) is None:
        network.config.decoder_start_token_id = network.config.pad_token_id
        network.generation_config.decoder_start_token_id = network.config.pad_token_id
