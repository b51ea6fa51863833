"""``shapes_only`` copies a model as fake tensors: its code runs, its numbers are neither stored nor computed."""

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

from ..ops.torch_api import without_onednn

Model = TypeVar("Model", bound=nn.Module)

_LARGE = 2**22  # elements; larger integer tensors, like attention masks, are not computed, to save memory
_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEX = torch.ops.aten.index.Tensor
_GROUPED = torch.ops.aten._grouped_mm.default  # knows no shapes but those of bfloat16
_UNFILLED = [getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty")]


@contextmanager
def shapes_only(model: Model) -> Iterator[Model]:
    """Context in which floating tensors have shapes alone; whole numbers and booleans are computed.

    So code that counts labels, looks at padding or picks rows by a mask does what it does in a real step.

    Args:
        model: Any module, on any device, or a copy that this made, which is used as it is.

    Returns:
        A copy of the module whose tensors have shapes alone; tied ones stay tied.

    Raises:
        ValueError: Code asks for a value of a floating tensor; says where.
    """
    outer_mode = next((x.fake_mode for x in model.parameters() if isinstance(x, FakeTensor)), None)
    mode, fake = outer_mode or FakeTensorMode(allow_non_fake_inputs=True), model
    if outer_mode is None:
        attributes = (x for part in model.modules() for x in vars(part).values() if isinstance(x, Tensor))
        with mode:
            memo: dict[int, Any] = {
                id(x): fake_tensor_like(x) for x in (*model.parameters(), *model.buffers(), *attributes)
            }
        fake = copy.deepcopy(model, memo)
    try:
        with without_onednn(), mode, _ComputeIntegers():  # type: ignore[no-untyped-call]
            yield fake
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"{_user_code_line(error)} asks for a value of a floating tensor, and a plan has shapes alone. Do without: "
            f"an .item(), a float(x) or an if x there also makes a GPU wait."
        ) from error


def fake_tensor_like(x: Tensor) -> Tensor:
    """Return a tensor of the same shape and type within ``shapes_only``; whole numbers keep their values.

    Raises:
        TypeError: It is of a tensor subclass, whose bytes are not known.
    """
    if type(x) not in (Tensor, nn.Parameter, nn.Buffer, FakeTensor):
        raise TypeError(f"A {type(x).__name__} has no plan; plan before the model is sharded, quantized or loaded.")
    parameter = isinstance(x, nn.Parameter)
    if not (x.is_floating_point() or x.is_complex() or x.is_meta or isinstance(x, FakeTensor) or parameter):
        return x.detach().cpu()
    new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return nn.Parameter(new, requires_grad=x.requires_grad) if parameter else new


def _user_code_line(error: Exception) -> str:
    """Return the last line of code outside of torch and of this file that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{f.filename}:{f.lineno}" for f in frames if "torch" not in Path(f.filename).parts]
    return next((place for place in reversed(places) if not place.startswith(f"{__file__}:")), "Code")


class _ComputeIntegers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Above a ``FakeTensorMode``: computes operations that neither take nor return floating tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            if func is _GROUPED:
                return args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
            return func(*_index_by_positions(args), **kwargs) if func is _INDEX else func(*args, **kwargs)
        if not _BY_VALUE & set(func.tags):
            shapes = func(*args, **kwargs)
            results = [x for x in tree_leaves(shapes) if isinstance(x, Tensor)]
            if func.overloadpacket in _UNFILLED or any(_has_no_values(x) for x in results):
                return shapes
        with no_dispatch():
            return func(*args, **kwargs)


def _has_no_values(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex() or x.numel() > _LARGE


def _index_by_positions(args: Any) -> Any:
    """Return arguments of indexing with positions in place of masks, so that the shape of the result is known."""
    x, indices = args
    masks = [i is not None and i.dtype == torch.bool and not isinstance(i, FakeTensor) for i in indices]
    with no_dispatch():
        positions = [i.nonzero(as_tuple=True) if mask else (i,) for i, mask in zip(indices, masks, strict=True)]
    return x, [i for group in positions for i in group]
