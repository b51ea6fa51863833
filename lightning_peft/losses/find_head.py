"""``selectable_head``: the output layer of a model, where its input can be selected from."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..core.active_on_host import called_adapters
from ..core.adapted_module import AdaptedModule
from ..ops.sharded_tensors import shard_of
from ..ops.torch_api import is_compiled_in_place, is_recorded
from ..structure.base_model import list_base_modules
from ..structure.transformers_api import is_pretrained, outermost_pretrained


def pretrained_of(model: nn.Module) -> Any:
    """Return the model of transformers inside of its wrappers; None where there is none."""
    return model if is_pretrained(model) else next((module for _, module in outermost_pretrained(model)), None)


def selectable_head(model: nn.Module) -> Any:
    """Return the output layer of a model; None where there is none, or its input cannot be selected from.

    Compiled code does not see hooks that come and go, and rows that have adapters of their own have to stay rows.
    """
    if is_recorded():
        return None
    pretrained = pretrained_of(model)
    head = None if pretrained is None else pretrained.get_output_embeddings()
    compiled = [m for m in list_base_modules(model) if "_orig_mod" in m._modules or is_compiled_in_place(m)]
    if head is None or any(part is head for module in compiled for part in module.modules()):
        return None
    by_row = isinstance(head, AdaptedModule) and any(not adapter.persistent for adapter in called_adapters(head))
    return None if by_row else head


def can_be_called_alone(model: nn.Module, head: nn.Module) -> bool:
    """Return whether a head can be called beside its model: no wrapper looks at outputs, and nothing is sharded."""
    if not is_pretrained(model):
        return False
    if any(isinstance(m, FSDPModule) or "_fsdp_wrapped_module" in m._modules for m in list_base_modules(model)):
        return False
    return not any(isinstance(p, DTensor) or shard_of(p) is not None for p in head.parameters())
