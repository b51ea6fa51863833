"""What cannot work as an adapter on a host, or beside others; each case fails silently without a check."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..structure.base_model import ADAPTERS_ATTRIBUTE
from ..structure.quantized import is_quantized
from .adapted_module import AdaptedModule
from .adapter import Adapter, WeightUpdate
from .tensor_parallel import is_split


def check_names(names: Sequence[str]) -> None:
    """Raise where methods share a name, or a child module cannot be called so."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"Two methods are named {twice[0]!r}; give one of them another name.")
    for name in names:
        _check_name(name)


def check_trainable(model: nn.Module, name: str) -> None:
    """Raise if a base parameter cannot train."""
    owner, _, key = name.rpartition(".")
    quantized = key == "weight" and is_quantized(model.get_submodule(owner))
    if quantized or not model.get_parameter(name).is_floating_point():
        raise TypeError(f"{name} is stored in few bits and cannot train; leave it out, or dequantize it.")


def _check_name(name: str) -> None:
    if not name or "." in name or name.startswith("_") or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"A method cannot be named {name!r}: choose a name without dots, which does not begin with _ and is not "
            f"one that torch uses."
        )


def check_host(host: nn.Module, name: str, key: str, adapter: Adapter) -> None:
    """Raise if an adapter on this host could not work; each case fails silently without this check."""
    kind = type(host).__name__
    shows = type(adapter).effective_weight is not Adapter.effective_weight
    if isinstance(host, nn.modules.linear.NonDynamicallyQuantizableLinear) and not shows:
        raise TypeError(
            f"{name} belongs to nn.MultiheadAttention, which reads its weight and never calls it; target other layers."
        )
    if isinstance(host, (nn.ModuleList, nn.ModuleDict)) or type(host).forward is nn.Module.forward:
        raise TypeError(f"{name} is a {kind}, which is never called; target the modules inside.")
    if isinstance(host, torch.jit.ScriptModule):
        raise TypeError(
            f"{name} is a ScriptModule, whose calls cannot be surrounded; adapt the module before scripting."
        )
    if "forward" in vars(host):
        raise TypeError(f"forward of {name} was replaced on the instance, which hides any adapter; inject before that.")
    if any(isinstance(p, DTensor) for part in host.modules() if not is_split(part) for p in part._parameters.values()):
        raise TypeError(f"{name} is sharded already, so adapters would train on each rank alone; inject, then shard.")
    if not isinstance(host, AdaptedModule) and hasattr(host, ADAPTERS_ATTRIBUTE):
        raise TypeError(f"{name} has an attribute {ADAPTERS_ATTRIBUTE!r} of its own, where its adapters would live.")
    if isinstance(host, AdaptedModule) and key in host.peft:
        raise ValueError(f"{name} already has an adapter {key!r}; give the method another name.")


def check_shared_host(found: Sequence[tuple[str, Adapter]]) -> None:
    """Raise where an adapter that rewrites rows of a weight as a whole would share them, or two replace a parameter."""
    updates, replaced = defaultdict[str, list[Adapter]](list), Counter[str]()
    for name, adapter in found:
        replaced.update(f"{name}.{key}" for key in adapter.replaces)
        if isinstance(adapter, WeightUpdate) or "weight" in adapter.replaces:
            updates[name].append(adapter)
    if twice := [key for key, count in replaced.items() if count > 1]:
        raise ValueError(f"Two adapters have {twice[0]} of their own; only one of them can take part at a time.")
    for name, adapter in [(n, a) for n, a in found if a.exclusive]:
        company = [a for a in updates[name] if a is not adapter]
        others = [a for a in company if "" in (a.part, adapter.part) or a.part == adapter.part]
        if others:
            raise ValueError(
                f"{type(adapter).__name__} at {name} rewrites the whole weight and cannot share it with "
                f"{type(others[0]).__name__}; give the methods different targets."
            )
