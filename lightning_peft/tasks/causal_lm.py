"""``CausalLM``: a LightningModule over a transformers decoder that continues text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.core.adapted_module import adapters
from lightning_peft.core.eval_mode import evaluating
from lightning_peft.losses.next_token_loss import next_token, next_token_logits
from lightning_peft.methods.families.vocabulary import grow_vocabulary
from lightning_peft.structure.transformers_api import enable_checkpointing
from lightning_peft.tasks.data.encoding.collator import IGNORED
from lightning_peft.tasks.decoder_checks import check_causal, check_decoder, check_positions
from lightning_peft.tasks.generation import chat_batch, generation_settings, left_padded, prompt_batch
from lightning_peft.tasks.optimization import check_optimization
from lightning_peft.tasks.pretrained import build_model, build_tokenizer
from lightning_peft.tasks.text_metrics import Perplexity
from lightning_peft.tasks.throughput import ThroughputModule
from lightning_peft.tasks.token_rows_check import check_ends, check_new_rows, check_tokens, count_rows, count_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CausalLM(ThroughputModule):
    """Predicts each next token; logs the loss, and in validation and test also ``val_perplexity`` and the like.

    Validation and test losses are means over tokens, whatever the batches. Labels of -100 do not count. Give exactly
    one of ``model`` and ``config``; the network is built in train mode.

    Args:
        model: Pretrained model: a folder, package:name/folder in an installed Python package, or a hub name.
        config: Settings of a model with random weights, with its model_type; or a config.json, or its folder.
        tokenizer: Where generate finds its tokenizer, in the same forms; by default the data's or the model's.
        max_new_tokens: Longest continuation in tokens.
        resize_embeddings: Whether the model gets embeddings for tokens that the tokenizer has and it lacks, each the
            mean of the others; or how many it shall have. The method must train them, as ``TrainableTokens`` does.
        learning_rate: Highest learning rate.
        weight_decay: Decoupled weight decay of AdamW.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What the learning rate does after the warm-up.
        gradient_checkpointing: Whether blocks keep their inputs alone and run again in the backward pass.
        dtype: Data type of the weights; auto keeps that of the pretrained file. Adapters are in float32 in any case.

    Examples:
        >>> from lightning_peft.tasks import CausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> module = CausalLM(config={"model_type": "llama", "vocab_size": 32, **sizes})
        >>> module(**module.sample_batch(2, 8)).shape
        torch.Size([2, 8, 32])
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | str | None = None,
        tokenizer: str | None = None,
        max_new_tokens: int = 64,
        resize_embeddings: bool | int = False,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.06,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(MetricCollection({"loss": MeanMetric(), "perplexity": Perplexity()}))
        check_optimization(learning_rate, weight_decay, warmup_fraction)
        self.save_hyperparameters()
        check_decoder(model, config)
        self.network = build_model("AutoModelForCausalLM", model, config, dtype)
        if gradient_checkpointing:
            enable_checkpointing(self.network)
        self._base_rows = count_rows(self.network)
        if resize_embeddings:  # a number, where a checkpoint says how many rows there were
            known = tokenizer is not None and resize_embeddings is True
            self._grow(count_tokens(self.tokenizer) if known else int(resize_embeddings))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of ``generate``, loaded on first use."""
        reference = self.hparams["tokenizer"] or self.hparams["model"]
        if reference is None:
            raise ValueError("Got neither model nor tokenizer, so text cannot be read. Give CausalLM a tokenizer.")
        return build_tokenizer(reference)

    def setup(self, stage: str) -> None:
        """Take the tokenizer of the data, unless one was named, and check that the model fits it."""
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None and self.hparams["tokenizer"] is None:
            self.tokenizer = tokenizer
        if tokenizer is not None and count_tokens(tokenizer) > count_rows(self.network) > 0:
            if self.hparams["resize_embeddings"] is not True:
                check_tokens(self.network, tokenizer)
            self._grow(count_tokens(tokenizer))
        if stage == "fit" and not any(adapters(self)):
            check_causal(self.network)

    def _grow(self, rows: int) -> None:
        """Give the network rows for tokens, and have checkpoints say how many."""
        grow_vocabulary(self.network, rows)
        if rows > self._base_rows:
            self.hparams["resize_embeddings"] = rows

    def on_fit_start(self) -> None:
        """Check that new rows train, that the model can tell where answers end, and that the data's rows fit it."""
        check_new_rows(self.network, range(self._base_rows, count_rows(self.network)))
        check_ends(self.network, self.data_of_tasks())
        check_positions(self.network, self.data_of_tasks())

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

    def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **settings: object
    ) -> str:
        """Answer a conversation, which the tokenizer's chat template writes.

        Args:
            messages: Turns, each with ``role`` and ``content``.
            tools: JSON schemas of functions that the assistant may call.
            settings: Of transformers' ``generate``, such as ``do_sample=True``.
        """
        return self.generate(chat_batch(self.tokenizer, messages, tools), **settings)[0]

    @torch.no_grad()
    def generate(self, prompts: str | list[str] | Mapping[str, Tensor], **settings: object) -> list[str]:
        """Continue prompts, without dropout; greedily unless the settings, or those of the model, say otherwise.

        Args:
            prompts: Texts, or a batch with ``input_ids`` and ``attention_mask``, padded on either side, and
                ``task_ids`` where adapters hold several tasks.
            settings: Of transformers' ``generate``, such as ``do_sample=True``.

        Returns:
            The new text of each prompt, without the prompt.
        """
        if not isinstance(prompts, Mapping):
            prompts = prompt_batch(self.tokenizer, [prompts] if isinstance(prompts, str) else prompts)
        inputs = {name: value.to(self.device) for name, value in left_padded(_inputs(prompts)).items()}
        network: Any = self.network
        config = self.hparams["config"]
        is_chosen = not isinstance(config, dict) or "eos_token_id" in config
        defaults = generation_settings(network, self.tokenizer, is_chosen)
        defaults["max_new_tokens"] = self.hparams["max_new_tokens"]
        with evaluating(network), self.own_tasks(prompts):
            tokens = network.generate(**inputs, **(defaults | settings))
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
