"""``CausalLM``: a LightningModule over a transformers decoder that continues text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.core.eval_mode import evaluating
from lightning_peft.losses.next_token_loss import next_token, next_token_logits
from lightning_peft.tasks.data.collator import IGNORED, Collator
from lightning_peft.tasks.module import TaskModule
from lightning_peft.tasks.optimization import check_optimization
from lightning_peft.tasks.pretrained import build_model, build_tokenizer, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Perplexity(MeanMetric):
    """exp of the mean loss per token, over all batches."""

    def compute(self) -> Tensor:
        """The perplexity so far."""
        mean: Tensor = super().compute()
        return mean.exp()


class CausalLM(TaskModule):
    """Predicts each next token; logs the loss, and in validation and test also ``val_perplexity`` and the like.

    Validation and test losses are means over tokens, whatever the batches. Labels of -100 do not count. Give exactly
    one of ``model`` and ``config``; the network is built in train mode.

    Args:
        model: Pretrained model: a folder, package:name/folder in an installed Python package, or a hub name.
        config: Settings of a model with random weights, with its model_type; or a config.json, or its folder.
        tokenizer: Where generate finds its tokenizer, in the same forms; by default the data's or the model's.
        max_new_tokens: Longest continuation in tokens.
        learning_rate: Highest learning rate.
        weight_decay: Decoupled weight decay of AdamW.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What the learning rate does after the warm-up.
        dtype: Data type of the weights; auto keeps that of the pretrained file. Adapters are in float32 in any case.
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | str | None = None,
        tokenizer: str | None = None,
        max_new_tokens: int = 64,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.06,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    ) -> None:
        super().__init__(MetricCollection({"loss": MeanMetric(), "perplexity": Perplexity()}))
        check_optimization(learning_rate, weight_decay, warmup_fraction)
        self.save_hyperparameters()
        self.network = build_model("AutoModelForCausalLM", model, config, dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of ``generate``, loaded on first use."""
        reference = self.hparams["tokenizer"] or self.hparams["model"]
        if reference is None:
            raise ValueError("Got neither model nor tokenizer, so text cannot be read. Give CausalLM a tokenizer.")
        return build_tokenizer(reference)

    def setup(self, stage: str) -> None:
        """Take the tokenizer of the data, unless one was named."""
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None and self.hparams["tokenizer"] is None:
            self.tokenizer = tokenizer

    def forward(self, **batch: Tensor) -> Tensor:
        """Logits of the token after each.

        Args:
            batch: ``input_ids``, ``attention_mask``, and ``task_ids`` where adapters hold several tasks; anything else
                is ignored.

        Shape:
            (batch, tokens, vocabulary)
        """
        with self.own_tasks(batch):
            logits: Tensor = self.network(**_inputs(batch), use_cache=False).logits
        return logits

    def sample_batch(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """A batch of this shape, in which each token has a label."""
        batch = super().sample_batch(rows, tokens)
        return {**batch, "labels": batch["input_ids"]}

    def labelled(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits (places, vocabulary) before each labelled token, and these tokens (places,)."""
        with self.own_tasks(batch):
            return next_token_logits(self.network, {**_inputs(batch), "labels": batch["labels"]})

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """Mean cross entropy of the labelled tokens."""
        loss = self._next_token(batch, "mean")
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Log loss and perplexity."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Log loss and perplexity."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: dict[str, Tensor]) -> None:
        count = (batch["labels"][:, 1:] != IGNORED).sum(1)
        losses = self._next_token(batch, "none")
        self.measure(split, batch, losses.sum(1) / count.clamp(min=1), count)

    def _next_token(self, batch: dict[str, Tensor], reduction: Literal["mean", "none"]) -> Tensor:
        with self.own_tasks(batch):
            return next_token(self.network, {**_inputs(batch), "labels": batch["labels"]}, reduction=reduction)

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> list[str]:
        """The continuation of each prompt."""
        return self.generate(batch)

    @torch.no_grad()
    def generate(self, prompts: str | list[str] | Mapping[str, Tensor], **settings: object) -> list[str]:
        """Continue prompts, without dropout; greedily unless the settings say otherwise.

        Args:
            prompts: Texts, or a batch with ``input_ids`` and ``attention_mask``, padded on either side, and
                ``task_ids`` where adapters hold several tasks.
            settings: Of transformers' ``generate``, such as ``do_sample=True``.

        Returns:
            The new text of each prompt, without the prompt.
        """
        if not isinstance(prompts, Mapping):
            prompts = _prompt_batch(self.tokenizer, [prompts] if isinstance(prompts, str) else prompts)
        inputs = {name: value.to(self.device) for name, value in _left_padded(_inputs(prompts)).items()}
        defaults = {"max_new_tokens": self.hparams["max_new_tokens"], "do_sample": False}
        defaults |= {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": self.tokenizer.eos_token_id}
        network: Any = self.network
        with evaluating(network), self.own_tasks(prompts):
            tokens = network.generate(**inputs, **(defaults | settings))
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _prompt_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Tensor]:
    rows = prompt_ids(tokenizer, texts)
    return Collator(tokenizer)([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])


def _left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    return {name: value.gather(1, order) for name, value in batch.items()}
