"""What the package relies on of torch beyond its documented interface; ``tests/ops/test_torch_api.py`` holds each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointFunction

_WRAPPED = "_lightning_peft_wraps"  # attribute of the module of torch
_MANY = 2**20  # elements that a tensor is taken to have whose sizes depend on values
HookKind = Literal["forward", "forward_pre", "state_dict", "load_state_dict_pre", "load_state_dict_post"]


def hooks(module: nn.Module, kind: HookKind) -> dict[int, Callable[..., Any]]:
    """Return the functions that are registered as hooks on a module, by the number of their registration.

    The handles that registering returns are no substitute: hooks are copied and pickled with a module, handles are not.
    """
    registered = getattr(module, f"_{kind}_hooks")
    return {number: getattr(hook, "hook", hook) for number, hook in registered.items()}


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module runs hooks, its own or those of all modules."""
    every = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
    )


def remove_hooks(module: nn.Module, kind: HookKind, function: Callable[..., Any]) -> bool:
    """Remove a function from the hooks of a module; return whether it was one."""
    numbers = [number for number, hook in hooks(module, kind).items() if hook is function]
    for number in numbers:
        del getattr(module, f"_{kind}_hooks")[number]
    return bool(numbers)


def write_count(tensor: Tensor) -> int:
    """Return a number that each write into a tensor raises; writes through ``.data`` do not."""
    return tensor._version


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has strided values in memory of its own: no subclass, no wrapper of ``torch.func``."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def storage_key(tensor: Tensor) -> int:
    """Return a number that tensors on one storage share, those without values included."""
    key: int = tensor.untyped_storage()._cdata
    return key


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all values of tensors in one vector: a copy, or the tensor itself if there is one alone."""
    result: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return result


def element_count(tensor: Tensor) -> int:
    """Return the number of elements, to choose the cheapest of forms that give the same result.

    Under ``torch.compile`` with dynamic sizes it is that of the call that compiles, and what is compared with it is no
    condition of the graph, which goes on to serve all sizes.
    """
    count = tensor.numel()
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import optimization_hint  # which takes time to import

        return optimization_hint(count, fallback=_MANY)
    return count


def local_part(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of the part of a sharded tensor that this process has, and where it begins."""
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offsets)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def is_recorded() -> bool:
    """Return whether ``torch.compile`` or ``torch.jit.trace`` records what runs, to run it again later."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def without_torch_function() -> AbstractContextManager[None]:
    """Context in which ``__torch_function__`` of subclasses of ``Tensor`` is not called."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return context


def without_function_modes() -> AbstractContextManager[None]:
    """Context in which neither modes nor subclasses intercept functions of torch."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def function_modes() -> list[TorchFunctionMode]:
    """Return the function modes of this thread, the innermost last; ``torch.compile`` understands the question."""
    modes: list[TorchFunctionMode] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return modes


def in_function_transform() -> bool:
    """Return whether this runs inside of a transform of ``torch.func``, such as ``vmap`` or ``grad``."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


@contextmanager
def without_onednn() -> Iterator[None]:
    """Context without the kernels of oneDNN, whose LSTM does not tell what it saves for backward."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def wrap_checkpointed(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let ``wrap(function)`` stand for each function that ``torch.utils.checkpoint`` keeps, to call it in backward.

    The names that other code has of ``checkpoint`` are bound before, so what it calls is replaced. Calling this again
    changes nothing.
    """
    if getattr(checkpointing, _WRAPPED, None) is not None:
        return
    generator: Any = checkpointing._checkpoint_without_reentrant_generator
    forward: Any = CheckpointFunction.forward

    @functools.wraps(generator)
    def wrapped_generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generator(wrap(fn), *args, **kwargs)

    @functools.wraps(forward)
    def wrapped_forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, wrap(run_function), *args)

    checkpointing._checkpoint_without_reentrant_generator = wrapped_generator
    CheckpointFunction.forward = staticmethod(wrapped_forward)  # type: ignore[method-assign]
    setattr(checkpointing, _WRAPPED, wrap)
