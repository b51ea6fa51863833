"""``head_inputs`` calls a model so that its output layer sees labelled places alone, and a few rows where it can.

How a model makes logits of hidden states is seen in this call: the input of its ``get_output_embeddings()``, and what
is done to their output (softcaps, scales, biases). No architecture is known here.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..core.active_on_host import called_adapters
from ..core.adapted_module import AdaptedModule
from ..ops.autograd_function import is_traced
from ..ops.sharded_tensors import shard_of
from ..ops.torch_api import is_compiled_in_place
from ..structure.transformers_api import is_pretrained, outermost_pretrained
from .recorded_logits import RecordedLogits, Tape

_CALLED_OTHERWISE = weakref.WeakSet[nn.Module]()  # heads that a call uses in a way that cannot be selected from


@dataclass(frozen=True)
class HeadInputs:
    """Hidden states at the labelled places of a batch, and how the model makes logits of them.

    Args:
        rows: Hidden states (places, width); logits (places, vocabulary) where ``head`` is None.
        head: The output layer, with its adapters; None where the model was called with all labelled places.
        first: What the model returned for the first row alone, detached before (vocabulary,); needs a gradient where
            more than hidden states is trained.
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


def pretrained_of(model: nn.Module) -> Any:
    """Return the model of transformers inside of its wrappers; None where there is none."""
    return model if is_pretrained(model) else next((module for _, module in outermost_pretrained(model)), None)


def head_inputs(model: nn.Module, inputs: Mapping[str, Any], places: Tensor, whole: bool = False) -> HeadInputs:
    """Call a model once, and return what its logits at some places are made of.

    Args:
        model: Model of transformers, adapted or not, or a wrapper of one.
        inputs: Arguments of its call.
        places: Which places are labelled (batch, tokens); the last tokens of a row where the model inserts others.
        whole: Whether to return logits in any case.
    """
    head = _selectable_head(model)
    if head is None:
        return HeadInputs(_logits(model(**inputs))[:, -places.shape[1] :][places])
    count = int(places.sum())
    whole = whole or count == 0 or not _is_called_freely(model, head)
    selection = _Selection(places if count else _first_place(places), whole)
    with selection.during(head):
        logits = _logits(model(**inputs))
    if selection.calls == 0 and logits.shape[1] >= places.shape[1]:
        return HeadInputs(logits[:, -places.shape[1] :][places])
    if selection.calls != 1 or not (whole or isinstance(logits, RecordedLogits) or logits is selection.output):
        _CALLED_OTHERWISE.add(head)
        return HeadInputs(_logits(model(**inputs))[:, -places.shape[1] :][places])
    if whole:
        return HeadInputs(logits[0][:count])
    finish = selection.tape.replayed(logits) if isinstance(logits, RecordedLogits) else None
    return HeadInputs(selection.rows, head, logits.as_subclass(Tensor)[0, 0], finish)


class _Selection:
    """Hooks around a call of a head, in the thread that created them: labelled rows go in, what comes out is recorded.

    Args:
        places: Which places are labelled.
        whole: Whether all of them go in, with their gradients; else the first alone, which tells how logits are made.
    """

    def __init__(self, places: Tensor, whole: bool) -> None:
        self.places, self.whole, self.thread = places, whole, threading.get_ident()
        self.calls, self.tape = 0, Tape()
        self.rows, self.output = places, places  # until the head was called

    @contextmanager
    def during(self, head: nn.Module) -> Iterator[None]:
        handles = [head.register_forward_pre_hook(self.select)]
        if not self.whole:
            handles.append(head.register_forward_hook(self.record))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def select(self, head: nn.Module, args: Any) -> Any:
        batch, tokens = self.places.shape
        if threading.get_ident() != self.thread or not args or args[0].dim() != 3:
            return None
        if len(args[0]) != batch or args[0].shape[1] < tokens:
            return None
        self.calls += 1
        self.rows = args[0][:, -tokens:][self.places.to(args[0].device)]
        return (self.rows[None] if self.whole else self.rows[None, :1].detach(), *args[1:])

    def record(self, head: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != self.thread or self.calls == 0:
            return output
        self.output = self.tape.record(output) if type(output) is Tensor else output
        return self.output


def _selectable_head(model: nn.Module) -> Any:
    """Return the output layer of a model; None where its input cannot be selected from.

    Compiled code does not see hooks that come and go, and rows that have adapters of their own have to stay rows.
    """
    if torch.compiler.is_compiling() or is_traced() or _is_compiled(model):
        return None
    pretrained = pretrained_of(model)
    head = None if pretrained is None or _is_compiled(pretrained) else pretrained.get_output_embeddings()
    if head is None or _is_compiled(head) or head in _CALLED_OTHERWISE:
        return None
    by_row = isinstance(head, AdaptedModule) and any(not adapter.persistent for adapter in called_adapters(head))
    return None if by_row else head


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or is_compiled_in_place(module)


def _is_called_freely(model: nn.Module, head: nn.Module) -> bool:
    """Return whether the head can be called beside the model: no wrapper looks at outputs, and nothing is sharded."""
    if not is_pretrained(model) or any(isinstance(module, FSDPModule) for module in model.modules()):
        return False
    return not any(isinstance(p, DTensor) or shard_of(p) is not None for p in head.parameters())


def _logits(output: Any) -> Any:
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise TypeError(
            f"The model returned a {type(output).__name__}, expected an output of transformers with logits."
        )
    return output.logits


def _first_place(places: Tensor) -> Tensor:
    """Return the first place of a batch without labels, so that what trains in the head gets a gradient of zero."""
    first = torch.zeros_like(places)
    first[0, 0] = True
    return first
