"""A model as shapes alone: its code runs, its numbers are neither stored nor computed."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Model = TypeVar("Model", bound=nn.Module)

_LARGE = 2**22  # numbers of one tensor: no code looks at a mask of tokens by tokens, which would take memory
_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEX = torch.ops.aten.index.Tensor
_UNFILLED = [getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty")]


@contextmanager
def shapes_only(model: Model) -> Iterator[Model]:
    """Context in which floating tensors have shapes alone; whole numbers and booleans are computed.

    So code that counts labels, looks at padding or picks rows by a mask does what it does in a real step.

    Args:
        model: Any module, on any device, or a copy that this made, which is taken itself.

    Returns:
        A copy of the module whose tensors have shapes alone; tied ones stay tied.

    Raises:
        ValueError: Code asks for a value of a floating tensor; says where.
    """
    known = next((x.fake_mode for x in model.parameters() if isinstance(x, FakeTensor)), None)
    mode, copied = known or FakeTensorMode(allow_non_fake_inputs=True), model
    if known is None:
        plain = (x for part in model.modules() for x in vars(part).values() if isinstance(x, Tensor))
        with mode:
            memo: dict[int, Any] = {id(x): fake_tensor_like(x) for x in (*model.parameters(), *model.buffers(), *plain)}
        copied = copy.deepcopy(model, memo)
    try:
        with _without_cpu_kernels(), mode, _WholeNumbers():  # type: ignore[no-untyped-call]
            yield copied
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"{_place(error)} asks for a value of a floating tensor, and a plan has shapes alone. Do without: an "
            f".item(), a float(x) or an if x there also makes a GPU wait."
        ) from error


def fake_tensor_like(x: Tensor) -> Tensor:
    """Return a tensor of the same shape and type within ``shapes_only``; whole numbers keep their values.

    Raises:
        TypeError: It is stored in a way of its own, so that its bytes are not known.
    """
    if type(x) not in (Tensor, nn.Parameter, nn.Buffer, FakeTensor):
        raise TypeError(f"A {type(x).__name__} has no plan; plan before the model is sharded, quantized or loaded.")
    parameter = isinstance(x, nn.Parameter)
    if not (x.is_floating_point() or x.is_complex() or x.is_meta or isinstance(x, FakeTensor) or parameter):
        return x.detach().cpu()
    new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return nn.Parameter(new, requires_grad=x.requires_grad) if parameter else new


def _place(error: Exception) -> str:
    """Return the last line of code outside of torch and of this file that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{f.filename}:{f.lineno}" for f in frames if "torch" not in Path(f.filename).parts]
    return next((place for place in reversed(places) if not place.startswith(f"{__file__}:")), "Code")


@contextmanager
def _without_cpu_kernels() -> Iterator[None]:
    """Context without oneDNN, whose LSTM does not tell what it saves; GPUs have none."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class _WholeNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Above a ``FakeTensorMode``: computes what depends on no floating tensor and gives none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*_picked(args), **kwargs) if func is _INDEX else func(*args, **kwargs)
        if not _BY_VALUE & set(func.tags):
            shapes = func(*args, **kwargs)
            found = [x for x in tree_leaves(shapes) if isinstance(x, Tensor)]
            if func.overloadpacket in _UNFILLED or any(_has_no_values(x) for x in found):
                return shapes
        with no_dispatch():
            return func(*args, **kwargs)


def _has_no_values(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex() or x.numel() > _LARGE


def _picked(args: Any) -> Any:
    """Return arguments of indexing with places instead of masks, whose number is known then."""
    x, indices = args
    masks = [i is not None and i.dtype == torch.bool and not isinstance(i, FakeTensor) for i in indices]
    with no_dispatch():
        places = [i.nonzero(as_tuple=True) if mask else (i,) for i, mask in zip(indices, masks, strict=True)]
    return x, [i for several in places for i in several]
