"""Checks of what the losses over several answers are given."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.value_checks import is_true

PADDING = -100


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise a ``ValueError`` unless labels are whole numbers (batch, choices, tokens) below the vocabulary, or -100."""
    if labels.dim() != 3 or labels.is_floating_point() or logits.dim() not in (3, 4):
        raise ValueError(
            f"Got logits {tuple(logits.shape)} and {labels.dtype} labels {tuple(labels.shape)}, expected logits "
            "(batch, choices, tokens, vocabulary) and whole numbers as labels (batch, choices, tokens)."
        )
    is_strange = ((labels < 0) & (labels != PADDING)) | (labels >= logits.shape[-1])
    expected = f"expected a token from 0 to {logits.shape[-1] - 1}, or -100 for padding."
    if not is_true(~is_strange.any(), f"Got another label, {expected}"):
        raise ValueError(f"Got the label {int(labels[is_strange][0])}, {expected}")


def check_gold(gold: Tensor, present: Tensor) -> None:
    """Raise a ``ValueError`` unless gold (batch,) are the numbers of choices that are there."""
    rows, choices = present.shape
    if gold.shape != (rows,) or gold.dtype != torch.long:
        raise ValueError(f"Got {gold.dtype} gold {tuple(gold.shape)}, expected torch.int64 of shape ({rows},).")
    outside, expected = (gold < 0) | (gold >= choices), f"expected the number of a choice from 0 to {choices - 1}."
    if not is_true(~outside.any(), f"Got another gold, {expected}"):
        raise ValueError(f"Got gold={int(gold[outside][0])}, {expected}")
    absent, reason = ~present.gather(1, gold[:, None])[:, 0], "but that choice is absent: all its labels are -100."
    if not is_true(~absent.any(), f"A row has a number as gold, {reason}"):
        row = int(absent.nonzero()[0])
        raise ValueError(f"Row {row} has gold={int(gold[row])}, {reason}")
