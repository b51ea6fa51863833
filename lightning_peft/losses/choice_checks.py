"""Checks of what the losses over several answers are given."""

from __future__ import annotations

import torch
from torch import Tensor

PADDING = -100


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise a ``ValueError`` unless labels are whole numbers (batch, choices, tokens) below the vocabulary, or -100."""
    if labels.dim() != 3 or labels.is_floating_point() or logits.dim() not in (3, 4):
        raise ValueError(
            f"Got logits {tuple(logits.shape)} and {labels.dtype} labels {tuple(labels.shape)}, expected logits "
            "(batch, choices, tokens, vocabulary) and whole numbers as labels (batch, choices, tokens)."
        )
    strange = labels[((labels < 0) & (labels != PADDING)) | (labels >= logits.shape[-1])]
    if len(strange):
        raise ValueError(
            f"Got the label {int(strange[0])}, expected a token from 0 to {logits.shape[-1] - 1}, or -100 for padding."
        )


def check_gold(gold: Tensor, present: Tensor) -> None:
    """Raise a ``ValueError`` unless gold (batch,) are the numbers of choices that are there."""
    rows, choices = present.shape
    if gold.shape != (rows,) or gold.dtype != torch.long:
        raise ValueError(f"Got {gold.dtype} gold {tuple(gold.shape)}, expected torch.int64 of shape ({rows},).")
    outside = (gold < 0) | (gold >= choices)
    if outside.any():
        raise ValueError(f"Got gold={int(gold[outside][0])}, expected the number of a choice from 0 to {choices - 1}.")
    absent = ~present.gather(1, gold[:, None])[:, 0]
    if absent.any():
        row = int(absent.nonzero()[0])
        raise ValueError(f"Row {row} has gold={int(gold[row])}, but that choice is absent: all its labels are -100.")
