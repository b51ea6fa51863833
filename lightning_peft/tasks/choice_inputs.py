"""Rows of a decoder that reads each answer after its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.losses import PADDING


def padded_at_the_end(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return rows that start at their first token, so that learned positions are right, too."""
    order = mask.argsort(dim=1, descending=True, stable=True)
    return {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order)}


def continued(prompts: Tensor, mask: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """Return the tokens of prompts (rows, tokens) and of answers (rows, tokens) as rows, padded at the end."""
    ids = torch.cat([prompts, answers.clamp(min=0)], 1)
    return padded_at_the_end(ids, torch.cat([mask, (answers != PADDING).to(mask.dtype)], 1))
