"""``check_base_values`` refuses a state that would change the frozen base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops.torch_api import is_plain
from ..structure.base_model import own_tensors
from .adapter_state import frozen_names, strip_wrapper_names


def check_base_values(model: nn.Module, loaded: Mapping[str, Tensor], source: str) -> None:
    """Raise a ``ValueError`` if a state would change the frozen base; the very values that it has may be in it."""
    frozen = {strip_wrapper_names(name): name for name in frozen_names(model)}
    for key, value in loaded.items():
        if (name := frozen.get(strip_wrapper_names(key))) is not None and not _is_equal(_tensor(model, name), value):
            raise ValueError(
                f"{source} holds other values of {key}, which belongs to the frozen base and would be overwritten. "
                f"Load it into the base before its adapters, or delete the key."
            )


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    tensor: Tensor = own_tensors(model.get_submodule(owner))[key]
    return tensor


def _is_equal(one: Tensor, other: Tensor) -> bool:
    alike = is_plain(one) and one.dtype == other.dtype and one.shape == other.shape
    return alike and not one.is_meta and torch.equal(one.detach().cpu(), other.detach().cpu())
