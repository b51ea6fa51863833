"""``hollow_twin``: a copy of a model that runs in a second on a CPU, whatever the size of the model and wherever it is.

Large weights are one number seen through a stride of 0. Layers of known types are not computed: each call returns
random numbers of the right shape. What lies between them, attention and its products too, runs as it is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..expert_layers import expert_weights
from ..transformers_api import CONV1D, use_eager_attention
from .bare_copy import bare_copy

_COPIED = 2**18  # elements up to which a stand-in has numbers of its own
_CONVOLUTIONS: dict[Any, Callable[..., Tensor]] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def hollow_twin(model: nn.Module) -> nn.Module:
    """Return the twin, in evaluation mode, on the CPU, in float32, without hooks and adapters."""
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _stand_in(tensor, generator)
    twin: nn.Module = _copy(model, memo, generator)
    for module in twin.modules():
        if (forward := _forward_of(module)) is not None:
            module.forward = forward
    use_eager_attention(twin)
    return twin.eval()


@contextmanager
def twin_runs() -> Iterator[None]:
    """Context in which a twin is made and runs: on the CPU, with random numbers that are the same in each process."""
    on_cpu = torch.get_default_device().type == "cpu"  # not so while a model is created on the meta device
    with nullcontext() if on_cpu else torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _copy(model: nn.Module, memo: dict[int, Any], generator: torch.Generator) -> Any:
    """Return a copy of a model, in which parameters stand for weights that parametrizations compute."""
    for module in reversed(list(model.modules())):  # children before their parents
        names: Any = getattr(module._modules.get("parametrizations"), "keys", list)()
        computed: Any = {name: _stand_in(nn.Parameter(getattr(module, name)), generator) for name in names}
        memo[id(module)] = bare_copy(module, memo, computed)
    return memo[id(model)]


def _stand_in(tensor: Tensor, generator: torch.Generator) -> Tensor:
    parameter = isinstance(tensor, nn.Parameter)
    if not parameter and not tensor.is_meta:
        copied = tensor.detach().to("cpu", copy=True)
        return copied.float() if copied.is_floating_point() else copied
    if not (parameter or tensor.is_floating_point()):
        return (
            torch.ones(tensor.shape, dtype=tensor.dtype)
            if tensor.dtype == torch.bool
            else torch.zeros(tensor.shape, dtype=tensor.dtype)
        )
    if tensor.numel() <= _COPIED:
        values = torch.rand(tensor.shape, generator=generator) + 0.5
    else:
        values = torch.full((1,), 0.02).expand(tensor.shape)
    return nn.Parameter(values, requires_grad=False) if parameter else values


def _forward_of(module: Any) -> Callable[..., Any] | None:
    """Return what stands for the forward of a layer whose output has a known shape; None for all other modules."""
    forward = inspect.unwrap(type(module).forward)
    if isinstance(module, nn.Linear) and (forward is nn.Linear.forward or not _computable(module)):
        return lambda x, *_: torch.randn(*x.shape[:-1], module.out_features)
    if f"{type(module).__module__}.{type(module).__qualname__}" == CONV1D:
        return lambda x: torch.randn(*x.shape[:-1], module.nf)
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        return lambda indices: torch.randn(*indices.shape, module.embedding_dim)
    kind = next((kind for kind in _CONVOLUTIONS if isinstance(module, kind)), None)
    if kind is not None and not is_depthwise(module) and forward is kind.forward and module.padding_mode == "zeros":
        settings = (module.stride, module.padding, module.dilation, module.groups)
        weight, product = torch.empty(module.weight.shape, device="meta"), _CONVOLUTIONS[kind]
        return lambda x: torch.randn(product(x.detach().to("meta"), weight, None, *settings).shape)
    if expert_weights(module):
        return lambda x, *_, **__: torch.randn(x.shape)  # what experts compute does not matter here
    return None


def is_depthwise(module: Any) -> bool:
    """Return whether a module is a convolution of each channel by itself, which maps no features."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == module.in_channels > 1


def _computable(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize >= 2
