"""``adapter_state`` returns adapter and trained state; the hook ``drop_base`` filters ``state_dict()`` to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..core.adapted_module import adapters, method_name
from ..core.adapter import Adapter
from ..core.injection_record import get_record, require_record
from ..core.method import Method
from ..ops.sharded_tensors import global_shape
from ..ops.torch_api import hooks
from ..structure.base_model import ADAPTERS_ATTRIBUTE, adapter_host, base_modules, base_paths, outwards
from ..structure.quantized import is_quantized

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|_forward_module)\.")


@contextmanager
def full_state_dict(model: nn.Module) -> Iterator[None]:
    """Context in which ``model.state_dict()`` holds the frozen base as well.

    Examples:
        >>> module = L.LightningModule()
        >>> module.layer = nn.Linear(32, 2)
        >>> lp.PEFTStrategy(lp.LoRA(rank=2, targets=["layer"])).apply(module)
        >>> with lp.full_state_dict(module):
        ...     list(module.state_dict())
        ['layer.weight', 'layer.bias', 'layer.peft.lora.a', 'layer.peft.lora.b']
    """
    with require_record(model).show_base():
        yield


def adapter_state(model: nn.Module, packed: bool = False, only: Sequence[Method] | None = None) -> dict[str, Tensor]:
    """Return the state of adapters and trained base parameters by key; a shared tensor appears once.

    With ``packed``, adapters leave out what only further training needs. With ``only``, the state is that of the
    adapters of these methods, and nothing else.
    """
    state: dict[str, Tensor] = {}
    for name, _, key, adapter in adapters(model):
        if _is_selected(key, adapter, only):
            tensors = adapter.export_state() if packed else adapter.state_dict(keep_vars=True)
            for entry, value in tensors.items():
                state[_adapter_prefix(name, key) + entry] = value
    if only is None:
        state |= _trained_state(model)
    first_key = {id(value): key for key, value in reversed(state.items())}  # of tensors that several keys share
    return {key: value for key, value in state.items() if first_key[id(value)] == key}


def _is_selected(key: str, adapter: Adapter, only: Sequence[Method] | None) -> bool:
    return only is None or method_name(key, adapter) in {method.name for method in only}


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, module in [("", model), *base_modules(model).items()]:
        trained = {k: p for k, p in module._parameters.items() if p is not None and p.requires_grad}
        moves = bool(trained) and not is_quantized(module)  # as statistics of a trained norm do, not those of codes
        buffers = module._buffers.items() if moves else ()
        persistent = {k: b for k, b in buffers if b is not None and k not in module._non_persistent_buffers_set}
        state |= {f"{name}.{k}".lstrip("."): value for k, value in (trained | persistent).items()}
    return state


def global_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state that the clients of a federation share: ``adapter_state`` without ``local_state``.

    ``model.load_state_dict(state, strict=False)`` takes it back.

    Examples:
        >>> method = lp.FedPara(rank=2, personalized=True, targets=["0"])
        >>> list(lp.global_state(lp.inject(nn.Sequential(nn.Linear(16, 8)), method)))
        ['0.peft.fedpara.x1', '0.peft.fedpara.y1']
    """
    local = local_state(model)
    return {key: value.detach() for key, value in adapter_state(model).items() if key not in local}


def local_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state that stays with a client: of pFedPara, the factors of the second matrix; else nothing.

    Examples:
        >>> method = lp.FedPara(rank=2, personalized=True, targets=["0"])
        >>> list(lp.local_state(lp.inject(nn.Sequential(nn.Linear(16, 8)), method)))
        ['0.peft.fedpara.x2', '0.peft.fedpara.y2']
    """
    return {
        _adapter_prefix(name, key) + entry: value.detach()
        for name, _, key, adapter in adapters(model)
        for entry, value in adapter.state_dict(keep_vars=True).items()
        if entry in adapter.local_tensors
    }


def unpacked(model: nn.Module, state: Mapping[str, Tensor], only: Sequence[Method] | None = None) -> dict[str, Tensor]:
    """Return the state that ``adapter_state(model, packed=True, only=only)`` gave this for."""
    unpacked_state = dict(state)
    for name, _, key, adapter in adapters(model):
        if not _is_selected(key, adapter, only):
            continue
        prefix = strip_wrapper_names(_adapter_prefix(name, key))
        packed = {k.removeprefix(prefix): unpacked_state.pop(k) for k in list(unpacked_state) if k.startswith(prefix)}
        unpacked_state |= {prefix + entry: value for entry, value in adapter.import_state(packed).items()}
    return unpacked_state


def check_state(
    model: nn.Module, loaded: Mapping[str, Tensor], source: str, only: Sequence[Method] | None = None
) -> None:
    """Raise a ``ValueError`` where a state lacks what this model's adapters need (or some methods'), or has more."""
    expected = {strip_wrapper_names(k): v for k, v in adapter_state(model, only=only).items()}
    state = {strip_wrapper_names(k): v for k, v in loaded.items()}
    unknown = [k for k in state.keys() - expected.keys() if f".{ADAPTERS_ATTRIBUTE}." in f".{k}"]
    base = _names_of_base(model) if unknown else set()
    problems = {
        "lacks": sorted(expected.keys() - state.keys()),
        "has no place for": sorted(k for k in unknown if not _is_under(k, base)),
        "has no tensor under": [k for k in expected if k in state and not isinstance(state[k], Tensor)],
        "has another shape of": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(global_shape(v))}"
            for k, v in expected.items()
            if isinstance(state.get(k), Tensor) and state[k].shape != global_shape(v)
        ],
    }
    sentences = [f"{problem} {', '.join(keys[:5])} ({len(keys)} in all)" for problem, keys in problems.items() if keys]
    if sentences:
        raise ValueError(
            f"{source} does not fit the adapters of this model: it {' and '.join(sentences)}. Use the method and "
            f"settings that it was written with."
        )


def _names_of_base(model: nn.Module) -> set[str]:
    """Return the names of all tensors of the base, trained or not; of a shared one each of its names."""
    host_of = adapter_host(model)
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {strip_wrapper_names(name) for name, _ in tensors if host_of(name) is None}


def strip_wrapper_names(key: str) -> str:
    """Return a key without the names that FSDP, torch.compile and other wrappers put into it."""
    return _WRAPPERS.sub("", key) if key.startswith("_") or "._" in key else key


def base_names(model: nn.Module) -> set[str]:
    """Return the state-dict keys of the base that training cannot change now."""
    return {strip_wrapper_names(name) for name in frozen_names(model)}


def frozen_names(model: nn.Module) -> set[str]:
    """Return the names of the base's parameters and buffers that training cannot change now, as the model has them."""
    names = set[str]()
    for name, module in base_paths(model):
        parameters = [(key, p) for key, p in module._parameters.items() if p is not None]
        frozen = [key for key, p in parameters if not p.requires_grad]
        if name and module._buffers and (len(frozen) == len(parameters) or is_quantized(module)):
            frozen += [key for key, buffer in module._buffers.items() if buffer is not None]
        names.update([f"{name}.{key}" for key in frozen] if name else frozen)
    return names


def _adapter_prefix(host_name: str, key: str) -> str:
    """Return the prefix of an adapter's keys."""
    return f"{host_name}.{ADAPTERS_ATTRIBUTE}.{key}.".lstrip(".")


def drop_base(module: nn.Module, state: dict[str, Any], prefix: str = "", metadata: Any = None) -> None:
    """Delete the frozen base from a module's state; the hook by which ``state_dict()`` leaves it out."""
    record = get_record(module)
    if record is not None and not record.shows_base and drop_base in hooks(module, "state_dict").values():
        names = base_names(module)
        for key in [
            k for k in state if k.startswith(prefix) and _is_under(strip_wrapper_names(k[len(prefix) :]), names)
        ]:
            del state[key]


def _is_under(key: str, names: set[str]) -> bool:
    """Whether a key is one of these names or below one: bitsandbytes writes statistics as ``weight.absmax``."""
    return any(prefix in names for prefix in outwards(key))


def drop_missing_base_keys(module: nn.Module, incompatible: Any) -> None:
    """Let loading not ask for the frozen base; the hook that goes with ``drop_base``."""
    record = get_record(module)
    if record is not None:
        record.mark_trained()
        names = base_names(module)
        missing = incompatible.missing_keys
        missing[:] = [k for k in missing if strip_wrapper_names(k).removeprefix("module.") not in names]
