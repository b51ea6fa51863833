"""``ImageClassification``: a LightningModule over a transformers classifier of images."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_peft.tasks.module import TaskModule
from lightning_peft.tasks.optimization import check_optimization
from lightning_peft.tasks.pretrained import build_model


class ImageClassification(TaskModule):
    """Classifies images by ViT, Swin, ConvNeXt, ResNet; logs loss, accuracy, macro F1 as ``val_accuracy`` and the like.

    Give exactly one of ``model`` and ``config``. The network is built in train mode, its new layers from torch's global
    generator, which ``seed_everything`` seeds. A pretrained classifier of other classes gets a new last layer, which
    has to train: name it in ``also_train``. The names of the classes are in the network's config.

    Args:
        model: Pretrained model: a folder, package:name/folder in an installed Python package, or a hub name.
        config: Settings of a model with random weights, with its model_type; or a config.json, or its folder.
        num_classes: Number of different labels.
        learning_rate: Highest learning rate.
        weight_decay: Decoupled weight decay of AdamW.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What the learning rate does after the warm-up.
        dtype: Data type of the weights; auto keeps that of the pretrained file.

    Examples:
        >>> from lightning_peft.tasks import ImageClassification
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> module = ImageClassification(config={"model_type": "vit", "image_size": 32, **sizes}, num_classes=10)
        >>> module(**module.sample_batch(2, 8)).shape
        torch.Size([2, 10])
    """

    accuracy = "accuracy"
    reads_tokens = False

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
            raise ValueError(f"Got num_classes={num_classes}, expected 2 or more, one for each class of the data.")
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "macro_f1": MulticlassF1Score(num_classes, average="macro"),
        }
        super().__init__(MetricCollection(metrics))
        check_optimization(learning_rate, weight_decay, warmup_fraction)
        self.save_hyperparameters()
        other_head = {} if model is None else {"ignore_mismatched_sizes": True}  # it then has a new last layer
        problem = {"num_labels": num_classes, "problem_type": "single_label_classification", **other_head}
        self.network = build_model("AutoModelForImageClassification", model, config, dtype, **problem)
        self.classes: list[str] | None = None

    def setup(self, stage: str) -> None:
        """Check the data's classes, and take their names, which travel with the adapter.

        Args:
            stage: The Trainer's.

        Raises:
            ValueError: If the data has another number of classes, or others than an adapter that is evaluated.
        """
        self.take_classes(stage)

    def forward(self, **batch: Tensor) -> Tensor:
        """Logits, one row per image.

        Args:
            batch: ``pixel_values`` (batch, channels, height, width); anything else is ignored.

        Shape:
            (batch, classes)
        """
        weights = next(parameter for parameter in self.network.parameters() if parameter.is_floating_point())
        logits: Tensor = self.network(pixel_values=batch["pixel_values"].to(weights.dtype)).logits
        return logits

    def sample_batch(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """A batch of images of the model's size, 224 where it has none.

        Args:
            rows: Number of images.
            tokens: Is not used.
        """
        size: Any = getattr(self.network.config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.zeros(rows, getattr(self.network.config, "num_channels", 3), height, width)
        return {"pixel_values": images, "labels": torch.zeros(rows, dtype=torch.long)}

    def on_predict_start(self) -> None:
        """Take the names of the classes, which a checkpoint or an adapter may have brought."""
        self.setup("predict")
        self.classes = self.class_names

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Any]:
        """The most likely class of each image, by name if it is known, and the probabilities of all classes."""
        probabilities = self(**batch).float().softmax(dim=-1)
        indices = probabilities.argmax(dim=-1).tolist()
        labels = indices if self.classes is None else [self.classes[index] for index in indices]
        return {"labels": labels, "probabilities": probabilities}
