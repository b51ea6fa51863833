"""``join_prompts`` puts prompts of one task together, ``ensemble`` runs all in one forward, ``majority_vote`` votes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter_folder import read_adapter, write_adapter
from ..core.method import from_dict, to_dict
from ..methods import PromptTuning
from ..methods.prompting.row_tasks import TaskAdapter, row_tasks


def join_prompts(folders: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str]) -> Path | str:
    """Write one adapter of several tasks from the adapters of ``PromptTuning`` that separate runs trained.

    Task k is the prompt of the k-th folder. ``load_adapter`` reads the result; ``ensemble`` runs all tasks at once.

    Args:
        folders: What ``save_adapter`` wrote, at least two times, for prompts of one length on one base.
        folder: Where to write.

    Returns:
        The folder.

    Raises:
        ValueError: The adapters are no single prompts, train more than prompts, or do not belong together.

    Examples:
        >>> model = nn.ModuleDict({"block": nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)})
        >>> _ = lp.inject(model, lp.PromptTuning(length=5, targets=["block"]))
        >>> runs = [lp.save_adapter(model, "run-1"), lp.save_adapter(model, "run-2")]
        >>> _ = lp.load_adapter(lp.detach(model), lp.join_prompts(runs, "joined"))
        >>> lp.summary(model).trainable  # 2 prompts of 5 x 16
        160
    """
    if len(folders) < 2:
        raise ValueError(f"At least two adapters make an ensemble, got {len(folders)}.")
    read = [read_adapter(source) for source in folders]
    methods = [_single_prompt(config, source) for (config, _), source in zip(read, folders, strict=True)]
    (first, state), method = read[0], methods[0]
    for (config, state_k), method_k, source in zip(read, methods, folders, strict=True):
        fields = {
            name: (getattr(method, name), getattr(method_k, name)) for name in ("length", "targets", "embeddings")
        }
        differ = {name: pair for name, pair in fields.items() if pair[0] != pair[1]}
        if state_k.keys() != state.keys() or config["base"] != first["base"]:
            differ["base"] = (first["base"], config["base"])
        if differ:
            raise ValueError(f"{source} does not belong to {folders[0]}; (there, here): {differ}.")
    tasks = to_dict(
        PromptTuning(
            name=method.name,
            length=method.length,
            tasks=len(read),
            targets=method.targets,
            embeddings=method.embeddings,
        )
    )
    stacked = {key: torch.stack([state_k[key] for _, state_k in read]) for key in state}
    return write_adapter(folder, {**first, "methods": [tasks]}, stacked)


def ensemble(model: nn.Module, **batch: Any) -> Tensor:
    """Run each row of a batch under each of the model's N tasks, in one forward; return logits (N, rows, ...).

    Args:
        model: A model whose adapters hold N tasks, and which returns logits, alone or by that name.
        batch: Arguments of the model; what has one entry for each row is repeated.

    Raises:
        ValueError: The model has not one number of several tasks, or the arguments not one number of rows.

    Examples:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        ...     def forward(self, x):
        ...         return self.block(x).mean(1)
        >>> model = lp.inject(Net(), lp.PromptTuning(length=5, tasks=3, targets=["block"]))
        >>> lp.ensemble(model, x=torch.randn(2, 7, 16)).shape  # 3 tasks, 2 rows, 16 logits
        torch.Size([3, 2, 16])
    """
    counts = {module.tasks for module in model.modules() if isinstance(module, TaskAdapter)} - {1}
    if len(counts) != 1:
        raise ValueError(f"An ensemble needs adapters of one number of tasks, got {sorted(counts)}.")
    tasks = counts.pop()
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.dim() > 0}
    rows = max((len(x) for x in tensors.values()), default=0)
    if mismatched := {name: len(x) for name, x in tensors.items() if len(x) not in (1, rows)} or not rows:
        raise ValueError(f"Each tensor must have {rows} rows as the longest, or one, got {mismatched}.")
    repeated = {name: x.repeat(tasks, *[1] * (x.dim() - 1)) for name, x in tensors.items() if len(x) == rows}
    with row_tasks(model, torch.arange(tasks).repeat_interleave(rows)):
        output = model(**{**batch, **repeated})
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise TypeError(
            f"{type(model).__name__} returns {type(output).__name__} without logits; pass a model with a head."
        )
    return logits.view(tasks, rows, *logits.shape[1:])


def majority_vote(logits: Tensor) -> Tensor:
    """Return the class that most of N models choose, for logits (N, rows, ..., classes): (rows, ...).

    Of classes with the same number of votes, the one with the largest sum of probabilities wins.

    Examples:
        >>> lp.majority_vote(torch.tensor([[[2.0, 1.0]], [[0.0, 3.0]], [[0.0, 1.0]]]))  # 3 models, 1 row, 2 classes
        tensor([1])
    """
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).sum(0)
    return shares.where(votes == votes.amax(-1, keepdim=True), -1).argmax(-1)


def _single_prompt(config: dict[str, Any], folder: str | os.PathLike[str]) -> PromptTuning:
    methods = [from_dict(data) for data in config["methods"]]
    method = methods[0]
    if len(methods) > 1 or not isinstance(method, PromptTuning) or method.tasks > 1 or config["also_train"]:
        raise ValueError(
            f"{folder} holds {methods}, also_train={config['also_train']}; only adapters of PromptTuning with one "
            f"task, which train nothing else, can be joined."
        )
    return method
