"""``check_host``, ``check_selection``, ``check_trainable``...: each refuses an injection that would fail silently."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Container, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..structure.base_model import computed_from, matches, stored_parameter
from ..structure.fused_rows import requested_rows
from ..structure.layer_of import layer_of
from ..structure.original_weight import original_of
from ..structure.quantized import is_quantized
from ..structure.read_weights import read_weight_attribute
from ..structure.recorded_selections import Selection
from ..structure.roles import ROLES, WEIGHT_ROLES
from ..structure.rows import Rows
from .adapter import Adapter
from .check_keys import check_keys
from .injection_record import InjectionRecord
from .tensor_parallel import is_split


def check_trainable(model: nn.Module, name: str) -> None:
    """Raise if a base parameter cannot train."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    quantized = original_of(module, key) is not None or (key == "weight" and is_quantized(module))
    if quantized or not stored_parameter(model, name).is_floating_point():
        raise TypeError(f"{name} is stored in few bits and cannot train; leave it out, or dequantize it.")


def check_host(host: nn.Module, name: str, key: str, adapter: Adapter) -> None:
    """Raise if an adapter on this host could not work; each case fails silently without this check."""
    is_read = isinstance(host, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if is_read and not (shows_weight(adapter) or adapter.replaces):
        raise TypeError(
            f"{name} belongs to nn.MultiheadAttention, which reads its weight and never calls it; target other layers."
        )
    if type(adapter).merge is not Adapter.merge and (sources := computed_from(host)):
        raise TypeError(
            f"{name} computes its weight from {', '.join(sources)} in each call, so that nothing could be merged into "
            f"it. Remove that first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
            f"remove_spectral_norm or prune.remove), or target other layers."
        )
    if isinstance(host, nn.MultiheadAttention) and _breaks_fast_path(host, adapter):
        raise TypeError(
            f"{type(adapter).__name__} would give {name} a bias, and nn.MultiheadAttention with batch_first=True fails "
            f"in evaluation if one of its two projections alone has one; create it with bias=True, or target others."
        )
    if isinstance(host, (nn.ModuleList, nn.ModuleDict)) or type(host).forward is nn.Module.forward:
        raise TypeError(f"{name} is a {type(host).__name__}, which is never called; target the modules inside.")
    if isinstance(host, torch.jit.ScriptModule):
        raise TypeError(
            f"{name} is a ScriptModule, whose calls cannot be surrounded; adapt the module before scripting."
        )
    if "forward" in vars(host):
        raise TypeError(f"forward of {name} was replaced on the instance, which hides any adapter; inject before that.")
    if any(isinstance(p, DTensor) and not is_split(part) for part in host.modules() for p in part._parameters.values()):
        raise TypeError(f"{name} is sharded already, so adapters would train on each rank alone; inject, then shard.")
    check_keys(host, name, key, adapter)


def check_not_read(host: nn.Module, name: str, read: Container[str]) -> None:
    """Raise if the weight of a host is read outside of its calls, where an adapter would not be seen.

    Args:
        host: The host.
        name: Its dotted name.
        read: Names of the modules of which a trace shows that.
    """
    if name in read and not read_weight_attribute(type(host)):
        raise TypeError(
            f"The weight of {name} is read outside of its calls, as in the fast path of Mamba: an adapter would change "
            f"nothing there, and something else once it is merged. Target other layers."
        )


def check_selection(selections: Sequence[Selection], placed: Sequence[tuple[str, Adapter]]) -> None:
    """Raise where a method selected rows of a layer, or a weight that is read, and its adapters change something else.

    A role can mean some rows of a fused layer (query in GPT-2's ``c_attn``), or a weight that its parent reads
    (``nn.MultiheadAttention``); what was selected by a glob means the module as a whole.
    """
    adapters_on = defaultdict[str, list[Adapter]](list)
    for name, adapter in placed:
        adapters_on[name].append(adapter)
    for name, requests in itertools.groupby(sorted(selections, key=lambda s: s.name), key=lambda s: s.name):
        if name in adapters_on:
            _check_requests(name, list(requests), adapters_on[name])


def _check_requests(name: str, requests: Sequence[Selection], placed: Sequence[Adapter]) -> None:
    if any(_means_module(request) for request in requests):
        return
    host = requests[0].host
    if layer_of(host).weight_read_by_parent and not all(map(shows_weight, placed)):
        raise TypeError(
            f"{type(placed[0]).__name__} surrounds the call of {name}, and the roles {list(requests[0].targets)} mean "
            f"weights that {type(host).__name__} reads without calling a layer. Derive it from WeightUpdate, or "
            f"override effective_weight and effective_bias; or target the module by a glob."
        )
    rows = [r for s in requests for r in requested_rows(name, host, s.targets, ROLES)]
    if None in rows:
        return
    selected = {row for part in rows if part is not None for row in part.numbers()}
    for adapter in placed:
        changed = adapter.rows or Rows("", 0, layer_of(host).shape(host)[0])
        if not selected.issuperset(changed.numbers()):
            described = ", ".join(str(part) for part in rows if part is not None)
            raise ValueError(
                f"{type(adapter).__name__} changes all rows of {name}, which computes query, key and value at once, "
                f"and its targets {list(requests[0].targets)} mean the rows {described}. Give WeightUpdate.__init__ "
                f"the rows that select returns, or target the layer by a glob."
            )


def _means_module(request: Selection) -> bool:
    """Return whether a glob, or a role of modules such as ``attention``, selected a module."""
    globs = [target for target in request.targets if target not in ROLES]
    modules = [role for role in request.targets if role in ROLES and role not in WEIGHT_ROLES]
    return any(matches(request.name, glob) for glob in globs) or bool(modules)


def shows_weight(adapter: Adapter) -> bool:
    """Return whether an adapter works on a host whose parent reads its weight."""
    cls = type(adapter)
    return cls.effective_weight is not Adapter.effective_weight or cls.effective_bias is not Adapter.effective_bias


def _breaks_fast_path(host: nn.MultiheadAttention, adapter: Adapter) -> bool:
    """Return whether torch's fast path, which takes both biases of attention or none, would get one of them."""
    without = host._parameters["in_proj_bias"] is None and host.batch_first and host.num_heads % 2 == 0
    return without and adapter.effective_bias(None) is not None


def check_not_paused(record: InjectionRecord) -> None:
    """Raise where adapters cannot be added, removed or switched now."""
    if record.merged is not None:
        raise RuntimeError("Adapters are merged into the weights and cannot change; call unmerge(model) first.")
    if record.paused:
        raise RuntimeError("Adapters cannot change while they are inactive: leave disabled() or row_adapters() first.")
