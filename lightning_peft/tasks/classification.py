"""``TextClassification``: a LightningModule over a transformers classifier of text."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import Tensor

from lightning_peft.tasks.data.mixed_loader import TASK_IDS
from lightning_peft.tasks.module import TaskModule
from lightning_peft.tasks.optimization import check_optimization
from lightning_peft.tasks.pretrained import build_model
from lightning_peft.tasks.problems import problem_of


class TextClassification(TaskModule):
    """Classifies or scores texts or pairs of texts; logs ``val_loss``, ``val_accuracy`` and the like.

    With one class for each text, metrics are accuracy and macro F1; with any number of them, micro and macro F1 and the
    share of exact matches; for scores, mean squared error and the correlations of Pearson and Spearman.

    Give exactly one of ``model`` and ``config``. The network is built in train mode (transformers loads in eval mode
    and Lightning does not change that), its new layers from torch's global generator, which ``seed_everything`` seeds.

    Args:
        model: Pretrained model: a folder, package:name/folder in an installed Python package, or a hub name.
        config: Settings of a model with random weights, with its model_type; or a config.json, or its folder.
        num_classes: Number of different labels; 1 for regression, where labels are numbers.
        multi_label: Whether a text may have any number of labels.
        threshold: Probability above which a text has a label, where it may have several.
        learning_rate: Highest learning rate.
        weight_decay: Decoupled weight decay of AdamW.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What the learning rate does after the warm-up.
        dtype: Data type of the weights; auto keeps that of the pretrained file.

    Examples:
        >>> from lightning_peft.tasks import TextClassification
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> module = TextClassification(config={"model_type": "bert", "vocab_size": 32, **sizes}, num_classes=4)
        >>> module(**module.sample_batch(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | str | None = None,
        *,
        num_classes: int,
        multi_label: bool = False,
        threshold: float = 0.5,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.06,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32",
    ) -> None:
        problem = problem_of(num_classes, multi_label, threshold)
        super().__init__(problem.metrics())
        self.problem, self.accuracy = problem, problem.accuracy
        check_optimization(learning_rate, weight_decay, warmup_fraction)
        self.save_hyperparameters()
        settings = {"num_labels": num_classes, "problem_type": problem.problem_type}
        self.network = build_model("AutoModelForSequenceClassification", model, config, dtype, **settings)
        self.has_token_types = "token_type_ids" in inspect.signature(self.network.forward).parameters
        self.classes: list[str] | list[int] | None = None

    def setup(self, stage: str) -> None:
        """Check and take the names of the data's classes, and its tokenizer, both of which travel with the adapter.

        Args:
            stage: The Trainer's.

        Raises:
            ValueError: If the data has another number of classes, or others than an adapter that is evaluated.
        """
        self._check_problem()
        self.take_classes(stage)
        data = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None:
            self.tokenizer = tokenizer
            self.network.config.pad_token_id = tokenizer.pad_token_id  # decoders find the last token by it

    def _check_problem(self) -> None:
        """Refuse data whose labels mean something else."""
        own = self.problem.problem_type
        for task in self.data_of_tasks():
            given = getattr(task, "problem_type", own)
            if given != own:
                count = len(getattr(task, "classes", None) or ()) or "the number of classes"
                changes = {
                    "regression": "num_classes: 1, and leave multi_label out,",
                    "multi_label_classification": f"num_classes: {count} and multi_label: true",
                    "single_label_classification": f"num_classes: {count}, and leave multi_label out,",
                }
                raise ValueError(
                    f"The data has problem_type={given!r}, but num_classes={self.hparams['num_classes']} and "
                    f"multi_label={self.hparams['multi_label']} mean {own!r}. Set problem_type: {own} in the data, or "
                    f"{changes[given]} in TextClassification."
                )

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

    def sample_batch(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """A batch of this shape, with labels as the problem has them."""
        return {**super().sample_batch(rows, tokens), "labels": self.problem.sample_labels(rows)}

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """Mean loss of the rows."""
        loss = self.problem.loss(*self.labelled(batch))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, split: str, batch: dict[str, Tensor]) -> None:
        logits, labels = self.labelled(batch)
        loss = self.problem.loss(logits, labels)
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.measure(split, batch, *self.problem.measured(logits, labels))

    def on_predict_start(self) -> None:
        """Take the names of the classes, which a checkpoint or an adapter may have brought."""
        classes = self.take_classes("predict")
        self.classes = self.class_names if classes is None else classes

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Any]:
        """What the problem predicts for each text: classes by name if they are known, or scores."""
        logits = self(**batch).float()
        return self.problem.predict(logits, self.classes or range(logits.shape[-1]))
