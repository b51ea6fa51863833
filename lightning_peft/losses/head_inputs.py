"""``head_inputs`` calls a model so that its output layer sees one labelled place, or labelled places alone.

How a model makes logits of hidden states is seen in this call: the input of its ``get_output_embeddings()``, and what
is done to their output (softcaps, scales, biases). No architecture is known here.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .find_head import can_be_called_alone, selectable_head
from .head_selection import HeadSelection
from .places import Places
from .recorded_logits import RecordedLogits

_SHAPE_ERRORS = (IndexError, RuntimeError, ValueError)
_FEW = 2**20  # logits
_called_otherwise = weakref.WeakSet[nn.Module]()  # heads whose model fails or answers otherwise with fewer places


@dataclass(frozen=True)
class HeadInputs:
    """Hidden states at the labelled places of a batch, and how the model makes logits of them.

    Args:
        rows: Hidden states (places, width); logits (places, vocabulary) where ``head`` is None.
        head: The output layer, with its adapters; None where the model was called with all labelled places.
        first: Logits (vocabulary,) that the model returned for the first row, which was detached: they need a gradient
            where more than hidden states is trained.
        finish: What the model does to the output of its head; None if nothing.
    """

    rows: Tensor
    head: Any = None
    first: Any = None
    finish: Callable[[Tensor], Tensor] | None = None

    def logits_of(self, rows: Tensor) -> Tensor:
        """Return the logits (n, vocabulary) of some rows, in float32 or wider."""
        if self.head is not None:
            output = self.head(rows[None])
            rows = (output if self.finish is None else self.finish(output))[0]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


def head_inputs(
    model: nn.Module, inputs: Mapping[str, Any], places: Places, chunk: int | None = None, whole: bool = False
) -> HeadInputs:
    """Call a model once, and return what its logits at some places are made of.

    Args:
        model: Model of transformers, adapted or not, or a wrapper of one.
        inputs: Arguments of its call.
        places: The labelled ones; those of the last tokens of a row where the model inserts others.
        chunk: Number of places whose logits may exist at a time; by default as many as have a million logits.
        whole: Whether to return logits, however many.
    """
    head = selectable_head(model)
    if head is None or head in _called_otherwise:
        return _of_all(model(**inputs), places)
    count = len(places)
    whole = whole or count <= (chunk or _few_rows(head)) or not can_be_called_alone(model, head)
    selection = HeadSelection(places.with_first(), whole)  # what trains in the head gets a gradient without labels, too
    output = _call(model, inputs, head, selection)
    if selection.calls == 0:
        return _of_all(output, places)
    logits: Any = getattr(output, "logits", None)
    if not selection.explains(logits):
        _called_otherwise.add(head)
        warnings.warn(
            f"{type(model).__name__} does not answer for some places alone as it does for all of them, so logits of "
            f"all places are computed, as by model(**batch). Only memory and time differ.",
            stacklevel=3,
        )
        return _of_all(model(**inputs), places)
    if whole:
        return HeadInputs(logits[0][:count])
    finish = selection.tape.replayed(logits) if isinstance(logits, RecordedLogits) else None
    return HeadInputs(selection.rows, head, logits.as_subclass(Tensor)[0, 0], finish)


def _call(model: nn.Module, inputs: Mapping[str, Any], head: nn.Module, selection: HeadSelection) -> Any:
    """Return the output of a model, None if it fails since the output of its head has fewer places than its input."""
    try:
        with selection.during(head):
            return model(**inputs)
    except _SHAPE_ERRORS as error:
        if selection.calls == 0 or isinstance(error, torch.OutOfMemoryError):
            raise
        return None


def _of_all(output: Any, places: Places) -> HeadInputs:
    """Return the logits of labelled places among those of all."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"The model returned a {type(output).__name__}, expected transformers' output with logits.")
    if logits.dim() != 3 or len(logits) != places.shape[0] or logits.shape[1] < places.shape[1]:
        raise ValueError(
            f"The model returned logits {tuple(logits.shape)} for labels {places.shape}, expected logits "
            f"(batch, tokens, vocabulary) with a place for each label."
        )
    return HeadInputs(places.take(logits))


def _few_rows(head: Any) -> int:
    """Return for how many places chunks are not worth their calls."""
    return _FEW // int(getattr(head, "out_features", _FEW))
