"""``next_token``: the loss of a language model, with logits at labelled places only, a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..structure.transformers_api import is_encoder_decoder
from .chunks import cross_entropy_sum, token_losses, token_values
from .find_head import pretrained_of
from .head_inputs import head_inputs
from .places import Places

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
    places. A device is waited for once: how many places are labelled decides what is computed.

    Args:
        model: Decoder of transformers, or a model with an encoder; with adapters or without, or a wrapper of one.
        batch: Arguments of its call, and ``labels`` (batch, tokens), -100 where there is none. Labels of a decoder are
            the ``input_ids``, not shifted; that of the first token does not count. ``decoder_input_ids`` are made of
            the labels where they are absent.
        reduction: ``mean`` over labelled tokens, 0 where there is none; ``sum``; or ``none``.
        chunk: Places at a time; by default as many as make a few million logits.

    Shape:
        (), or for ``none`` that of the labels, with 0 where there is none

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> loss = lp.losses.next_token(model, {"input_ids": ids, "labels": ids})  # the last line of a training_step
        >>> torch.allclose(loss, model(ids, labels=ids).loss)
        True
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"Got reduction={reduction!r}, expected 'mean', 'sum' or 'none'.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"Got chunk={chunk}, expected a number of places from 1 on, or None.")
    inputs, targets = aligned(model, batch)
    if torch.compiler.is_compiling():  # a graph has no shapes that depend on values
        losses = _at_labels(model, _losses_of_all(model(**inputs).logits, targets))
        return _reduced(losses, targets != IGNORED, reduction)
    places = Places.of(targets != IGNORED)
    tokens, found = places.take(targets), head_inputs(model, inputs, places, chunk)
    if reduction == "none":
        return _at_labels(model, places.spread(token_values(token_losses, found, tokens, chunk)))
    total = cross_entropy_sum(found, tokens, chunk)
    return total / max(1, len(tokens)) if reduction == "mean" else total


def next_token_logits(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the logits (places, vocabulary) before each labelled token, and these tokens (places,).

    Args:
        model: As for ``next_token``.
        batch: As for ``next_token``.
    """
    inputs, targets = aligned(model, batch)
    places = Places.of(targets != IGNORED)
    found = head_inputs(model, inputs, places, whole=True)
    return found.logits_of(found.rows), places.take(targets)


def aligned(model: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Return arguments of a call, and the label (batch, tokens) that each place predicts, -100 where there is none."""
    inputs: dict[str, Any] = {"use_cache": False, **batch}
    labels, read = inputs.pop("labels", None), _tokens(batch)
    shifted = not is_encoder_decoder(pretrained_of(model))
    if not isinstance(labels, Tensor) or labels.dim() != 2 or (shifted and labels.shape != read):
        raise ValueError(
            f"Got labels {tuple(labels.shape) if isinstance(labels, Tensor) else labels}, expected a label for each "
            f"token {read if shifted else '(batch, tokens)'}, -100 where it does not count."
        )
    if shifted:
        return inputs, torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
    if inputs.get("decoder_input_ids") is None:
        shift = getattr(pretrained_of(model), "prepare_decoder_input_ids_from_labels", None)
        made = {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}
        inputs |= made  # models without such a method (M2M100) make them in their call
    return inputs, labels


def _at_labels(model: Any, losses: Tensor) -> Tensor:
    """Return losses at the places of the labels, given those at the places that predict them."""
    return losses if is_encoder_decoder(pretrained_of(model)) else losses.roll(1, 1)


def _losses_of_all(logits: Tensor, targets: Tensor) -> Tensor:
    rows = logits[:, -targets.shape[1] :].flatten(0, 1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return cross_entropy(rows, targets.flatten(), reduction="none", ignore_index=IGNORED).view_as(targets)


def _reduced(losses: Tensor, places: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / (places.sum().clamp(min=1) if reduction == "mean" else 1)


def _tokens(batch: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape (batch, tokens) of what a model reads."""
    read = batch["input_ids"] if batch.get("input_ids") is not None else batch.get("inputs_embeds")
    return None if read is None else tuple(read.shape[:2])
