"""``parallelize``: tensor parallelism of Llama-like models, whose layers are found by their roles."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ...core.adapted_module import adapters
from ...core.tensor_parallel import broadcast_values, check_tensor_parallel_support, mesh_of, shard_adapters
from ...structure.base_model import ADAPTERS_ATTRIBUTE, base_parameters, count_owners
from ...structure.fused_rows import is_fused
from ...structure.roles import ROLES

_COLUMNS, _OUTPUT = ("attention.query", "attention.key", "attention.value"), "attention.output"
_UP, _DOWN = "feedforward.up", "feedforward.down"
_ADVICE = (
    "Tensor parallelism by roles fits Llama-like models; call parallelize_module in configure_model, or use FSDP2."
)

Places = Mapping[str, Sequence[str]]  # the layers of each role in one module


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split the blocks of a Llama-like model over a mesh; adapters that are there follow their hosts.

    Column-wise: the query, key and value projections, by heads, and the feed-forward's up-projections. Row-wise: the
    attention's output projection and the down-projection. The rest is whole on each process, with the values that the
    mesh's first process has. Nothing is changed if anything is wrong; a model that is split already stays as it is.

    Args:
        model: Model, adapted or not; layers may be on the meta device.
        mesh: Processes to split over, in one dimension.

    Returns:
        The model.

    Raises:
        TypeError: The model is not Llama-like, or an adapter cannot follow; says which part and why.
        ValueError: Heads or features do not divide.

    Examples:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from lightning_peft.training.distributed import parallelize
        >>> parallelize(nn.Sequential(nn.Linear(16, 8)), mesh=None)  # init_device_mesh("cuda", (2,)) in each process
        Traceback (most recent call last):
        TypeError: Sequential has no layers of attention.query. ...
    """
    if mesh_of(model) is not None:
        return model
    attention, feedforward = _places(model, (*_COLUMNS, _OUTPUT)), _places(model, (_UP, _DOWN))
    holders = (*attention.values(), *feedforward.values())
    layers = [(role, name) for places in holders for role, names in places.items() for name in names]
    _check_layers(model, [name for _, name in layers])
    for name, places in attention.items():
        _check_attention(model, name, places, mesh.size())
    for name, places in feedforward.items():
        _check_feedforward(model, name, places, mesh.size())
    for name, host, key, adapter in adapters(model):
        check_tensor_parallel_support(host, name, key, adapter)
    for role, name in layers:
        _split(model.get_submodule(name), mesh, RowwiseParallel() if role in (_OUTPUT, _DOWN) else ColwiseParallel())
    broadcast_values((*model.parameters(), *model.buffers()), mesh)
    shard_adapters(model, mesh)
    return model


def _split(host: nn.Module, mesh: DeviceMesh, style: ParallelStyle) -> None:
    slot = host._modules.pop(
        ADAPTERS_ATTRIBUTE, None
    )  # a style takes every parameter below a layer for the layer's own
    parallelize_module(host, mesh, style)
    if slot is not None:
        host._modules[ADAPTERS_ATTRIBUTE] = slot


def _places(model: nn.Module, roles: Sequence[str]) -> dict[str, Places]:
    """Return the layers of these roles by the module that holds them; each such module must have all."""
    by_holder: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for role in roles:
        for name in ROLES[role](model):
            by_holder[name.rpartition(".")[0]].setdefault(role, []).append(name)
    for holder, places in by_holder.items():
        if missing := [role for role in roles if role not in places]:
            raise TypeError(f"{holder or 'The model'} holds {_first(places)} and no {missing[0]}. {_ADVICE}")
        single = [role for role in roles if role != _UP]
        if double := [role for role in single if len(places[role]) > 1]:
            raise TypeError(f"{holder or 'The model'} holds {len(places[double[0]])} layers of {double[0]}. {_ADVICE}")
    if not by_holder:
        raise TypeError(f"{type(model).__name__} has no layers of {roles[0]}. {_ADVICE}")
    return dict(by_holder)


def _first(places: Places) -> str:
    return next(iter(places.values()))[0]


def _check_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Raise where a layer is no plain linear one, or shares its weight."""
    owners = count_owners(model)
    for name in names:
        if is_fused(name, model.get_submodule(name)):
            raise TypeError(f"{name} computes query, key and value at once; its rows are not split by heads. {_ADVICE}")
        host: Any = model.get_submodule(name)
        kind = getattr(host, "_host_class", type(host))
        if kind is not nn.Linear or type(host.weight) is not nn.Parameter:
            raise TypeError(f"{name} is a {kind.__name__} with a {type(host.weight).__name__}, not a plain nn.Linear.")
        if any(owners[id(p)] > 1 for p in host._parameters.values() if p is not None):
            raise TypeError(f"{name} shares a parameter with another module, and both would have to be split alike.")


def _check_attention(model: nn.Module, name: str, places: Places, size: int) -> None:
    """Raise unless each process can compute some of the heads, without knowing of the others."""
    attention = model.get_submodule(name)
    _check_only_projections(attention, name, places)
    head_dim, read = getattr(attention, "head_dim", None), _names_read(attention)
    counts = sorted(word for word in read if "head" in word and not any(part in word for part in ("dim", "size")))
    if not isinstance(head_dim, int) or "head_dim" not in read or counts:
        reason = f"reads {counts[0]}" if counts else "does not go by head_dim"
        raise TypeError(
            f"{name} ({type(attention).__name__}) {reason}: with a part of the heads it would be silently wrong. "
            f"{_ADVICE}"
        )
    for role in _COLUMNS:
        _check_divides(model, places[role][0], head_dim, "heads", size)


def _names_read(module: nn.Module) -> set[str]:
    """Return the attributes and globals that the methods of a module's class name, but for its construction."""
    classes = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    methods = [method for cls in classes for key, method in vars(cls).items() if key != "__init__" and callable(method)]
    codes = [m.__code__ for m in map(inspect.unwrap, methods) if inspect.isfunction(m)]
    for code in codes:  # which grows by the functions within
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return {name for code in codes for name in code.co_names}


def _check_feedforward(model: nn.Module, name: str, places: Places, size: int) -> None:
    """Raise unless each process can compute some of the features between the layers, alone."""
    _check_only_projections(model.get_submodule(name), name, places)
    down: Any = model.get_submodule(places[_DOWN][0])
    for up in places[_UP]:
        if (width := model.get_submodule(up).out_features) != down.in_features:
            raise TypeError(f"{up} returns {width} features for {places[_DOWN][0]}'s {down.in_features}. {_ADVICE}")
        _check_divides(model, up, 1, "features", size)


def _check_only_projections(holder: nn.Module, name: str, places: Places) -> None:
    """Raise where a module holds parameters or norms beside its projections."""
    inside = tuple(f"{layer.rpartition('.')[2]}." for layers in places.values() for layer in layers)
    norms = [n for n, module in holder.named_modules() if type(module).__name__.endswith("Norm")]
    if others := [p for p in (*base_parameters(holder), *norms) if not p.startswith(inside)]:
        raise TypeError(f"{name} has {others[0]}, which would act on a part of the features alone. {_ADVICE}")


def _check_divides(model: nn.Module, name: str, unit: int, unit_name: str, size: int) -> None:
    host: Any = model.get_submodule(name)
    if host.out_features % (unit * size):
        count = host.out_features // unit
        raise ValueError(f"{name} computes {count} {unit_name}, which {size} processes cannot share equally.")
