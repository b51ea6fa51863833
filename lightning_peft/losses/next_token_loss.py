"""``next_token``: the loss of a language model, with logits at labelled places only, a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..structure.transformers_api import is_encoder_decoder
from .chunks import cross_entropy_sum, token_losses, token_values
from .head_inputs import head_inputs, pretrained_of

IGNORED = -100


def next_token(
    model: Any,
    batch: Mapping[str, Any],
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Return the cross entropy of labelled tokens, mean of -log p(y_t | x, y_<t), as ``model(**batch).loss`` does.

    Neither forward nor backward has more than a chunk of logits: the output layer is called on the hidden states of
    labelled places alone. Adapted, trained, tied and biased ones are called as they are, and what the model does after
    them (softcap, scale) is done to each chunk. With models that are compiled as a whole, and with ``row_adapters`` on
    the output layer, all logits exist; with sharded or wrapped ones (FSDP, tensor parallelism, DDP), those of labelled
    places.

    Args:
        model: Decoder of transformers, or a model with an encoder; with adapters or without, or a wrapper of one.
        batch: Arguments of its call, and ``labels`` (batch, tokens), -100 where there is none. Labels of a decoder are
            the ``input_ids``, not shifted; that of the first token does not count. ``decoder_input_ids`` are made of
            the labels where they are absent.
        reduction: ``mean`` over labelled tokens, 0 where there is none; ``sum``; or ``none``.
        chunk: Places at a time.

    Shape:
        (), or for ``none`` that of the labels, with 0 where there is none

    Example:
        >>> def training_step(self, batch, batch_index):
        ...     return lightning_peft.losses.next_token(self.model, batch)
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"Got reduction={reduction!r}, expected 'mean', 'sum' or 'none'.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"Got chunk={chunk}, expected a number of places from 1 on, or None.")
    inputs, places, tokens = labelled_places(model, batch)
    found = head_inputs(model, inputs, places)
    if reduction == "none":
        values = token_values(token_losses, found, tokens, chunk)
        losses = values.new_zeros(places.shape).masked_scatter(places, values)
        return losses if is_encoder_decoder(pretrained_of(model)) else losses.roll(1, 1)
    total = cross_entropy_sum(found, tokens, chunk)
    return total / max(1, len(tokens)) if reduction == "mean" else total


def next_token_logits(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the logits (places, vocabulary) before each labelled token, and these tokens (places,).

    Args:
        model: As for ``next_token``.
        batch: As for ``next_token``.
    """
    inputs, places, tokens = labelled_places(model, batch)
    found = head_inputs(model, inputs, places, whole=True)
    return found.logits_of(found.rows), tokens


def labelled_places(model: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return arguments of a call, the places (batch, tokens) that predict a labelled token, and these tokens."""
    inputs: dict[str, Any] = {"use_cache": False, **batch}
    labels, read = inputs.pop("labels", None), _tokens(batch)
    shifted = not is_encoder_decoder(pretrained_of(model))
    if not isinstance(labels, Tensor) or labels.dim() != 2 or (shifted and labels.shape != read):
        raise ValueError(
            f"Got labels {tuple(labels.shape) if isinstance(labels, Tensor) else labels}, expected a label for each "
            f"token {read if shifted else '(batch, tokens)'}, -100 where it does not count."
        )
    places = labels != IGNORED
    if shifted:
        places = torch.cat([places[:, 1:], torch.zeros_like(places[:, :1])], 1)
        return inputs, places, labels[:, 1:][places[:, :-1]]
    if inputs.get("decoder_input_ids") is None:
        inputs["decoder_input_ids"] = pretrained_of(model).prepare_decoder_input_ids_from_labels(labels=labels)
    return inputs, places, labels[places]


def _tokens(batch: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape (batch, tokens) of what a model reads."""
    read = batch["input_ids"] if batch.get("input_ids") is not None else batch.get("inputs_embeds")
    return None if read is None else tuple(read.shape[:2])
