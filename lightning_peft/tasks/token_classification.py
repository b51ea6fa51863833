"""``TokenClassification``: a LightningModule over a transformers model that gives each word a tag."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.tasks.data.encoding.collator import IGNORED
from lightning_peft.tasks.data.mixed_data import MixedDataModule
from lightning_peft.tasks.data.mixed_loader import TASK_IDS
from lightning_peft.tasks.data.token_data import WORD_COUNTS, WORDS
from lightning_peft.tasks.entity_metrics import EntityF1, EntityMetric, EntityPrecision, EntityRecall
from lightning_peft.tasks.module import TaskModule, mean_loss
from lightning_peft.tasks.optimization import check_optimization
from lightning_peft.tasks.pretrained import build_model


class TokenClassification(TaskModule):
    """Gives each word a tag; logs ``val_loss``, F1, precision and recall of entities, and the accuracy of tags.

    Entities are those of tags in IOB1, IOB2 or IOBES (``val_f1`` and the like, over all types); tests log the F1 of
    each type as well, as ``test_f1/person``. Losses are means over labelled tokens. Give exactly one of ``model`` and
    ``config``; the network is built in train mode.

    Args:
        model: Pretrained model: a folder, package:name/folder in an installed Python package, or a hub name.
        config: Settings of a model with random weights, with its model_type; or a config.json, or its folder.
        num_classes: Number of different tags.
        learning_rate: Highest learning rate.
        weight_decay: Decoupled weight decay of AdamW.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What the learning rate does after the warm-up.
        dtype: Data type of the weights; auto keeps that of the pretrained file.

    Examples:
        >>> from lightning_peft.tasks import TokenClassification
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> module = TokenClassification(config={"model_type": "bert", "vocab_size": 32, **sizes}, num_classes=5)
        >>> module(**module.sample_batch(2, 8)).shape
        torch.Size([2, 8, 5])
    """

    accuracy = "accuracy"

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | str | None = None,
        *,
        num_classes: int,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.06,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32",
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"Got num_classes={num_classes}, expected 2 or more, one for each tag of the data.")
        metrics: dict[str, Metric | MetricCollection] = {
            "f1": EntityF1(num_classes),
            "precision": EntityPrecision(num_classes),
            "recall": EntityRecall(num_classes),
            "accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED),
        }
        super().__init__(MetricCollection(metrics))
        check_optimization(learning_rate, weight_decay, warmup_fraction)
        self.save_hyperparameters()
        self.network = build_model("AutoModelForTokenClassification", model, config, dtype, num_labels=num_classes)
        self.has_token_types = "token_type_ids" in inspect.signature(self.network.forward).parameters

    def setup(self, stage: str) -> None:
        """Check and take the names of the data's tags, and its tokenizer, both of which travel with the adapter.

        Args:
            stage: The Trainer's.

        Raises:
            ValueError: If the data has another number of tags, or others than an adapter that is evaluated.
        """
        self.take_classes(stage)
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def on_predict_start(self) -> None:
        """Take the names of the tags, which a checkpoint may have brought."""
        self.take_classes("predict")

    def on_validation_start(self) -> None:
        """Check that entities can be told, and tell the metrics how."""
        self._read_tags("val")

    def on_test_start(self) -> None:
        """Check that entities can be told, and tell the metrics how."""
        self.take_classes("test")
        self._read_tags("test")

    def _read_tags(self, split: str) -> None:
        tags = self.class_names
        if tags is None:
            raise ValueError(
                "Entities cannot be told, since tags have no names here. Give a DataModule with a list of all tags in "
                "its attribute classes, such as TokenDataModule, or a model whose config has them (id2label)."
            )
        metrics: MetricCollection = getattr(self, f"{split}_metrics")
        for metric in metrics.values(copy_state=False):
            if isinstance(metric, EntityMetric):
                metric.read_tags(tags)

    def forward(self, **batch: Tensor) -> Tensor:
        """Logits, for each token of each row.

        Args:
            batch: What the tokenizer returned, and ``task_ids`` where adapters hold several tasks. Labels are ignored.

        Shape:
            (batch, tokens, tags)
        """
        ignored = {"labels", TASK_IDS, WORDS, WORD_COUNTS} | (set() if self.has_token_types else {"token_type_ids"})
        with self.own_tasks(batch):
            logits: Tensor = self.network(**{name: batch[name] for name in batch if name not in ignored}).logits
        return logits

    def sample_batch(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """A batch of this shape, in which each token has a tag."""
        batch = super().sample_batch(rows, tokens)
        return {**batch, "labels": batch["input_ids"].new_zeros(rows, tokens)}

    def labelled(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits (places, tags) wherever a token has a tag, and the tags (places,)."""
        is_labelled = batch["labels"] != IGNORED
        return self(**batch)[is_labelled].float(), batch["labels"][is_labelled]

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """Mean cross entropy of the tags; places without one are not picked out, for which a device would wait."""
        loss = mean_loss(self(**batch).float().flatten(0, 1), batch["labels"].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_test_epoch_end(self) -> None:
        """Log the F1 of each type of entity, or the metrics of each task where data has several."""
        super().on_test_epoch_end()
        if not isinstance(getattr(self.trainer, "datamodule", None), MixedDataModule):
            entities: Any = self.test_metrics["f1"]
            self.log_dict({f"test_f1/{kind}": value for kind, value in entities.by_type().items()})

    def _evaluate(self, split: str, batch: dict[str, Tensor]) -> None:
        logits, labels = self(**batch).float(), batch["labels"]
        is_labelled = labels != IGNORED
        loss = mean_loss(logits[is_labelled], labels[is_labelled])
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=int(is_labelled.sum()), sync_dist=True)
        self.measure(split, batch, logits.argmax(dim=-1), labels)

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Any]:
        """The tag of each word, by name if it is known; None for words that were cut off.

        Of a batch that does not tell where words begin, the tag of each token.
        """
        numbers, names = self(**batch).argmax(dim=-1), self.class_names or range(self.hparams["num_classes"])
        if WORDS not in batch:
            rows = [row[mask.bool()].tolist() for row, mask in zip(numbers, batch["attention_mask"], strict=True)]
            return {"tags": [[names[number] for number in row] for row in rows]}
        tags = list[list[Any]]()
        for row, words, count in zip(numbers.tolist(), batch[WORDS].tolist(), batch[WORD_COUNTS].tolist(), strict=True):
            found = {word: names[number] for word, number in zip(words, row, strict=True) if word != IGNORED}
            tags.append([found.get(word) for word in range(count)])
        return {"tags": tags}
