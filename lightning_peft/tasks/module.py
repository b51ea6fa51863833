"""``TaskModule``: base class of the LightningModules of this package."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection

from lightning_peft.checkpoints.reader import CHECKPOINT_KEY
from lightning_peft.core.adapted_module import adapters
from lightning_peft.methods.prompting.encoded_prompt import EncodedPrompt
from lightning_peft.methods.prompting.row_tasks import TaskAdapter, row_tasks
from lightning_peft.structure.class_names import class_names, set_class_names
from lightning_peft.tasks.data.encoding.collator import IGNORED
from lightning_peft.tasks.data.mixed_data import MixedDataModule
from lightning_peft.tasks.data.mixed_loader import TASK_IDS
from lightning_peft.tasks.messages import quoted
from lightning_peft.tasks.optimization import adamw
from lightning_peft.tasks.pretrained import weights_folder
from lightning_peft.training.lightning_checkpoint import inject_from_checkpoint


class TaskModule(LightningModule):
    """Module over one network, whose hyperparameters name its optimization, and whose checkpoints hold adapters only.

    Batches may mix the tasks of a `MixedDataModule`: each row uses the adapter of its task where adapters hold
    several, and evaluation logs the metrics of all rows and, as ``val_accuracy/NAME``, those of each task.

    Args:
        metrics: Metrics of evaluation.
    """

    network: Any
    accuracy: str | None = None  # which metric is the share of right answers

    def __init__(self, metrics: MetricCollection) -> None:
        super().__init__()
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")
        self.metrics_by_task = nn.ModuleDict()

    @property
    def base_weights(self) -> str | None:
        """Where ``FSDP2Strategy(base_weights="auto")`` reads a network that was built without values."""
        return weights_folder(self.hparams["model"]) if self.hparams.get("model") else None

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes that the network's configuration has; they travel with adapters and checkpoints."""
        return class_names(self)

    def take_classes(self, stage: str) -> list[str] | list[int] | None:
        """Give the network the names of the data's classes, by number, if the data has some; return what they are.

        Args:
            stage: The Trainer's.

        Raises:
            ValueError: The data has another number of classes, or an adapter is evaluated that was trained on others.
        """
        names: list[str] | list[int] | None = getattr(getattr(self.trainer, "datamodule", None), "classes", None)
        if names is None:
            return None
        count = self.hparams["num_classes"]
        if len(names) != count:
            raise ValueError(
                f"Got num_classes={count}, but the data has {len(names)} classes: {quoted(names)}. "
                f"Set num_classes={len(names)}."
            )
        trained, given = self.class_names, list(map(str, names))
        if stage != "fit" and trained not in (None, given) and any(adapters(self)):
            raise ValueError(
                f"The adapter was trained on the classes {quoted(trained or ())}, and the data has {quoted(given)}. "
                "Give the train file that it was trained on, or none where it only predicts."
            )
        set_class_names(self, given)
        return names

    def data_of_tasks(self) -> list[Any]:
        """The data that the Trainer runs on: that of each task where several are mixed, else one, or none."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, MixedDataModule):
            return list(data.tasks.values())
        return [] if data is None else [data]

    def own_tasks(self, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Context in which each row uses the adapter of its task, if adapters hold several and the batch has ids."""
        if TASK_IDS not in batch:
            return nullcontext()
        several = any(isinstance(module, TaskAdapter) and module.tasks > 1 for module in self.network.modules())
        return row_tasks(self.network, batch[TASK_IDS]) if several else nullcontext()

    def labelled(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits (places, choices) wherever a batch has a label, and the labels (places,)."""
        return self(**batch).float(), batch["labels"]

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log ``train_padding``, the share of the batch's tokens that are padding; no device has to wait for it."""
        if "attention_mask" in batch:
            self.log("train_padding", 1 - batch["attention_mask"].float().mean())

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """Mean cross entropy of the labels."""
        loss = mean_loss(*self.labelled(batch))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Log loss and metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Log loss and metrics."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: dict[str, Any]) -> None:
        """Log the loss of a batch, and update the metrics by its logits and labels."""
        logits, labels = self.labelled(batch)
        loss = cross_entropy(logits, labels)
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.measure(split, batch, logits, labels)

    def measure(self, split: str, batch: Mapping[str, Tensor], *rows: Tensor) -> None:
        """Update and log the metrics of an evaluation.

        Args:
            split: ``val`` or ``test``.
            batch: What was evaluated.
            rows: Arguments of the metrics, each with one entry for each row.
        """
        metrics: MetricCollection = getattr(self, f"{split}_metrics")
        metrics.update(*rows)
        self.log_dict(metrics, prog_bar=True, batch_size=len(rows[0]))
        for number in set(batch[TASK_IDS].tolist()) if TASK_IDS in batch else ():
            key = f"{split}_{number}"
            if key not in self.metrics_by_task:
                fresh = metrics.clone()
                fresh.reset()
                self.metrics_by_task[key] = fresh
            task_metrics: Any = self.metrics_by_task[key]
            task_metrics.update(*(x[batch[TASK_IDS] == number] for x in rows))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of each task."""
        self._log_tasks("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of each task."""
        self._log_tasks("test")

    def _log_tasks(self, split: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        for number, name in enumerate(data.tasks if isinstance(data, MixedDataModule) else ()):
            metrics: Any = self.metrics_by_task[key] if (key := f"{split}_{number}") in self.metrics_by_task else None
            if metrics is not None:
                self.log_dict({f"{metric}/{name}": value for metric, value in metrics.compute().items()})
                metrics.reset()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the adapters of such a checkpoint, so that ``load_from_checkpoint`` reads it."""
        if CHECKPOINT_KEY in checkpoint:
            inject_from_checkpoint(self, checkpoint)

    def sample_batch(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """A batch of this shape, as the module's data makes them; values do not matter, and nothing is padding.

        Args:
            rows: Number of rows.
            tokens: Number of tokens in each, pseudo tokens of a template included.
        """
        ids, first = torch.ones(rows, tokens, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        for module in self.network.modules():
            if isinstance(module, EncodedPrompt) and module.placeholder is not None:
                ids[:, : len(module.prompt)] = module.placeholder
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": first, TASK_IDS: first}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over what requires a gradient, with the schedule."""
        names = ("learning_rate", "weight_decay", "warmup_fraction", "schedule")
        return adamw(self, **{name: self.hparams[name] for name in names})


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, the mean over places that have a label, -100 being none; zero where there is none."""
    return cross_entropy(logits, labels, reduction="sum") / (labels != IGNORED).sum().clamp(min=1)
