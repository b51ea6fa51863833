"""NaN and infinity among the values of adapters: a warning where they are loaded, an error where they would spread."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..ops.torch_api import is_plain
from .adapter import has_values


def warn_of_nonfinite(state: Mapping[str, Tensor], source: str) -> None:
    """Warn if tensors of an adapter that is loaded hold NaN or infinity."""
    if keys := _nonfinite(state):
        warnings.warn(
            f"{source} holds NaN or infinity in {_listed(keys)}: its training diverged, or the file is damaged. What "
            f"it computes is no result; load an earlier checkpoint.",
            stacklevel=3,
        )


def check_finite(state: Mapping[str, Tensor], action: str) -> None:
    """Raise a ``ValueError`` if tensors that are merged or exported hold NaN or infinity."""
    if keys := _nonfinite(state):
        raise ValueError(
            f"NaN or infinity would be {action} from {_listed(keys)}: training diverged, or a file is damaged. Load an "
            f"earlier checkpoint, or pass allow_nonfinite=True to do it anyway."
        )


def _listed(keys: list[str]) -> str:
    return f"{', '.join(keys[:3])} ({len(keys)} in all)"


def _nonfinite(state: Mapping[str, Tensor]) -> list[str]:
    """Return the keys of tensors that hold NaN or infinity; a device is waited for once, and not for each tensor."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    joint = {key: value.detach() for key, value in tensors.items() if _has_fast_norm(value)}
    if joint and bool(torch.stack(torch._foreach_norm(list(joint.values()))).isfinite().all()):
        tensors = {key: value for key, value in tensors.items() if key not in joint}
    flags = defaultdict[torch.device, dict[str, Tensor]](dict)
    for key, value in tensors.items():
        if (flag := _is_finite(value)) is not None:
            flags[flag.device][key] = flag
    finite: dict[str, bool] = {}
    for on_device in flags.values():
        finite |= zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True)
    return [key for key in tensors if not finite.get(key, True)]


def _has_fast_norm(value: Tensor) -> bool:
    """Whether a tensor is looked at together with others: a norm that is finite needs no look at each value.

    A norm overflows where the square of a value does; each value is looked at then.
    """
    return is_plain(value) and value.dtype == torch.float32 and value.device.type == "cpu"


def _is_finite(value: Tensor) -> Tensor | None:
    """Return one boolean, where the values are; None where there are none, or of a type that is always finite."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if not has_values(local) or not (local.is_floating_point() or local.is_complex()):
        return None
    wide = local.float() if local.itemsize == 1 else local  # 8-bit floats have no isfinite
    return torch.isfinite(wide).all()
