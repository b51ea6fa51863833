"""``Distillation``: a student learns from a frozen teacher as well (https://arxiv.org/abs/2303.02861, equation 4)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import kl_div

from ..core.method import check_setting
from ..methods.prompting.virtual_tokens import Insertion, names_of
from ..structure.transformers_api import backbones, is_encoder_decoder
from ..tasks.module import TaskModule, mean_loss

_Module = TypeVar("_Module", bound=nn.Module)
States = list[tuple[Tensor, Tensor]]  # hidden states (rows, tokens, features) and mask (rows, tokens) of each stack


class Distillation(LightningModule):
    """Trains a student on L_task + weight * (L_logits + L_hidden), as its teacher answers the same batches.

    L_logits = KL(softmax(z_teacher / T) || softmax(z_student / T)), the mean over labelled places; L_hidden = the
    squared difference of the last hidden states, of encoder and decoder where there are both, at tokens that are
    neither padding nor virtual. The teacher is no child: it is not trained, counted or saved.

    Args:
        student: What trains; its own hyperparameters name its optimization.
        teacher: A module whose batches and logits are like the student's.
        weight: Lambda.
        temperature: T, of both.
        hidden: ``mean`` of the squares over tokens and features, or their ``sum`` for each row, the mean over rows.
    """

    def __init__(
        self,
        student: TaskModule,
        teacher: TaskModule,
        weight: float = 1.0,
        temperature: float = 1.0,
        hidden: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(dict(student.hparams), logger=False)  # data look up the model that is trained there
        check_setting(weight >= 0, "weight", weight, "0 or above")
        check_setting(temperature > 0, "temperature", temperature, "above 0")
        check_setting(hidden in ("mean", "sum"), "hidden", hidden, "'mean' or 'sum'")
        self.student, self._teacher = student, (teacher.requires_grad_(False).eval(),)
        self.weight, self.temperature, self.hidden = weight, temperature, hidden

    @property
    def teacher(self) -> TaskModule:
        """The frozen teacher."""
        return self._teacher[0]

    def setup(self, stage: str) -> None:
        """Let both know the data."""
        self.student.setup(stage)
        self.teacher.trainer = self.trainer
        self.teacher.setup(stage)

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device."""
        self.teacher.to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """The sum of the three losses."""
        losses = self.losses(batch)
        loss = losses["task"] + self.weight * (losses["logits"] + losses["hidden"])
        self.log_dict({f"train_{name}_loss": value for name, value in losses.items()})
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Log L_task."""
        logits, labels = self.student.labelled(batch)
        self.log("val_loss", mean_loss(logits, labels), prog_bar=True, batch_size=len(labels))

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L_task, L_logits and L_hidden of a batch, as ``task``, ``logits`` and ``hidden``."""
        with hidden_states(self.student.network) as own:
            logits, labels = self.student.labelled(batch)
        with torch.no_grad(), hidden_states(self.teacher.network) as theirs:
            expected, _ = self.teacher.labelled(batch)
        return {
            "task": mean_loss(logits, labels),
            "logits": divergence(expected, logits, self.temperature),
            "hidden": distance(own, theirs, self.hidden),
        }

    def configure_optimizers(self) -> Any:
        """The student's."""
        return self.student.configure_optimizers()


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of logits (places, choices), both divided by a temperature; the mean over places."""
    log_p, log_q = ((z.float() / temperature).log_softmax(-1) for z in (teacher, student))
    return kl_div(log_q, log_p, reduction="sum", log_target=True) / max(1, len(log_q))


def distance(student: States, teacher: States, reduction: str) -> Tensor:
    """The squared difference of hidden states at visible tokens, summed over stacks."""
    total: Tensor = torch.zeros((), device=student[0][0].device)
    for (hidden, mask), (target, _) in zip(student, teacher, strict=True):
        squares = (hidden.float() - target.float()).square().sum(-1).masked_fill(~mask.bool(), 0).sum()
        count = mask.sum() * hidden.shape[-1] if reduction == "mean" else len(hidden)
        total = total + squares / count
    return total


@contextmanager
def hidden_states(network: nn.Module) -> Iterator[States]:
    """Context that collects the last hidden states of a network's stacks, without virtual tokens, as they are computed.

    Raises:
        ValueError: The network has no transformers backbone.
    """
    stacks = [stack for _, host in backbones(network) for stack in _stacks(host)]
    if not stacks:
        raise ValueError("No transformers backbone is found in the network, whose hidden states could be compared.")
    states: States = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = dict(zip(names_of(module), args, strict=False)) | kwargs
        hidden: Tensor = output[0]
        mask = call.get("attention_mask")
        if mask is None:
            inputs = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
            mask = hidden.new_ones(inputs.shape[:2])
        virtual = hidden.shape[1] - mask.shape[1]
        states.append((Insertion(virtual, mask).remove(hidden) if virtual else hidden, mask))

    handles = [stack.register_forward_hook(keep, with_kwargs=True) for stack in stacks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _stacks(host: Any) -> list[nn.Module]:
    return [host.get_encoder(), host.get_decoder()] if is_encoder_decoder(host) else [host]


def twin(module: _Module) -> _Module:
    """Return a copy whose parameters and buffers are those of the original, so that only what is added takes memory."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())})
