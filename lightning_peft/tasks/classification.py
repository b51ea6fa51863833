"""``TextClassification``: a LightningModule over a transformers classifier of text."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_peft.tasks.data.mixed_loader import TASK_IDS
from lightning_peft.tasks.messages import quoted
from lightning_peft.tasks.module import TaskModule
from lightning_peft.tasks.optimization import check_optimization
from lightning_peft.tasks.pretrained import build_model


class TextClassification(TaskModule):
    """Classifies texts or pairs of texts; logs loss, accuracy and macro F1 as ``val_accuracy`` and the like.

    Give exactly one of ``model`` and ``config``. The network is built in train mode (transformers loads in eval mode
    and Lightning does not change that), its new layers from torch's global generator, which ``seed_everything`` seeds.

    Args:
        model: Pretrained model: a folder, package:name/folder in an installed Python package, or a hub name.
        config: Settings of a model with random weights, with its model_type; or a config.json, or its folder.
        num_classes: Number of different labels.
        learning_rate: Highest learning rate.
        weight_decay: Decoupled weight decay of AdamW.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What the learning rate does after the warm-up.
        dtype: Data type of the weights; auto keeps that of the pretrained file.
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
            raise ValueError(f"Got num_classes={num_classes}, expected 2 or more, one for each label of the data.")
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "macro_f1": MulticlassF1Score(num_classes, average="macro"),
        }
        super().__init__(MetricCollection(metrics))
        check_optimization(learning_rate, weight_decay, warmup_fraction)
        self.save_hyperparameters()
        problem = {"num_labels": num_classes, "problem_type": "single_label_classification"}
        self.network = build_model("AutoModelForSequenceClassification", model, config, dtype, **problem)
        self.has_token_types = "token_type_ids" in inspect.signature(self.network.forward).parameters
        self.classes: list[str] | list[int] | None = None

    def setup(self, stage: str) -> None:
        """Check and take the names of the data's classes, and its tokenizer, both of which travel with the adapter.

        Args:
            stage: The Trainer's.

        Raises:
            ValueError: If the data has another number of classes, or others than an adapter that is evaluated.
        """
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "classes", None)
        num_classes = self.hparams["num_classes"]
        if classes is not None and len(classes) != num_classes:
            raise ValueError(
                f"Got num_classes={num_classes}, but the data has {len(classes)} classes: {quoted(classes)}. "
                f"Set num_classes={len(classes)}."
            )
        if classes is not None:
            self.name_classes(classes, stage)
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None:
            self.tokenizer = tokenizer
            self.network.config.pad_token_id = tokenizer.pad_token_id  # decoders find the last token by it

    def forward(self, **batch: Tensor) -> Tensor:
        """Logits, one row per text.

        Args:
            batch: What the tokenizer returned, and ``task_ids`` where adapters hold several tasks. Labels are ignored.

        Shape:
            (batch, classes)
        """
        ignored = {"labels", TASK_IDS} | (set() if self.has_token_types else {"token_type_ids"})
        with self.own_tasks(batch):
            logits: Tensor = self.network(**{name: batch[name] for name in batch if name not in ignored}).logits
        return logits

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Log loss and metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Log loss and metrics."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: dict[str, Tensor]) -> None:
        logits, labels = self.labelled(batch)
        loss = cross_entropy(logits, labels)
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.measure(split, batch, logits, labels)

    def on_predict_start(self) -> None:
        """Take the names of the classes, which a checkpoint or an adapter may have brought."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "classes", None)
        if classes is not None:
            self.name_classes(classes, "predict")
        self.classes = self.class_names if classes is None else classes

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Any]:
        """The most likely class of each text, by name if the data knows it, and the probabilities of all classes."""
        probabilities = self(**batch).float().softmax(dim=-1)
        indices = probabilities.argmax(dim=-1).tolist()
        labels = indices if self.classes is None else [self.classes[index] for index in indices]
        return {"labels": labels, "probabilities": probabilities}
