"""``save_adapter`` writes the folder of an adapter; ``load_adapter`` injects and loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..core.adapter_folder import located, read_adapter, write_adapter
from ..core.inject import detach
from ..core.injection_record import get_record, methods_named, require_record
from ..core.method import Method
from ..core.nonfinite import warn_of_nonfinite
from ..files.allocation_limit import limit_allocation
from ..files.storage import Location
from ..ops.sharded_tensors import assign, full_tensor, shard_of, writes_files
from ..structure.class_names import set_class_names
from .adapter_state import adapter_state, check_state, strip_wrapper_names, unpacked
from .companion_files import CLASS_NAMES, companion_files
from .key_prefix import align_keys
from .metadata import adapter_metadata, inject_from_metadata, with_class_names

_WRAPPED, _FLATTENED = "_fsdp_wrapped_module.", "_flat_param"  # in names that FullyShardedDataParallel gives


def check_known_shards(model: nn.Module) -> None:
    """Raise where a wrapper spreads parameters over processes and they do not say what they are parts of.

    Raises:
        TypeError: Values that are read of them would be parts, without a shape.
    """
    names = [name for name, _ in model.named_parameters()]
    flattened = any(name.endswith(_FLATTENED) for name in names)
    spread = dist.is_initialized() and dist.get_world_size() > 1 and any(_WRAPPED in name for name in names)
    if flattened or (spread and all(shard_of(parameter) is None for parameter in model.parameters())):
        raise TypeError(
            f"{type(model).__name__} was wrapped in FullyShardedDataParallel by other code, so shapes and values of "
            f"its parameters are not known here. Shard it by a strategy of lightning_peft, or by torch's fully_shard."
        )


def save_adapter(model: nn.Module, folder: Location, name: str | None = None, tokenizer: Any = None) -> Path | str:
    """Write the adapters and trained base parameters of a model, and what is needed to inject them again.

    The names of a classifier's classes are written, too, where its configuration has some (``id2label``).

    Args:
        model: The same module that was given to ``inject`` (with a Trainer: the LightningModule).
        folder: Where to write, a path or an address that fsspec opens (``s3://...``). An adapter that is there is
            replaced at once: whoever reads meanwhile, or after a kill, finds the old one or the new one. Of several
            processes the first writes; where the model is sharded, all have to call.
        name: Name of the adapters to write where the model has several; all if not given.
        tokenizer: Tokenizer or processor to write beside the adapter, with its chat template; by default what the
            module has as ``tokenizer`` or ``processor``, if it has one.

    Returns:
        The folder: a path, or the address that was given.

    Raises:
        ValueError: The name is unknown, or parameters of the base train, which belong to no name.
        TypeError: A wrapper shards the model and does not say how; strategies of this package do. Or what is given as
            tokenizer is none.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), lp.LoRA(rank=2, targets=["0"]))
        >>> folder = lp.save_adapter(model, "my-adapter")
        >>> sorted(path.name for path in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_known_shards(model)
    only = None if name is None else methods_named(require_record(model), name)
    description = with_class_names(adapter_metadata(model, packed=True, only=only), model, only is None)
    if only is not None and (trained := require_record(model).trained):
        raise ValueError(f"{trained[0]} trains in the base itself and belongs to no name; save all, without a name.")
    tensors = adapter_state(model, packed=True, only=only)
    state = {strip_wrapper_names(k): full_tensor(v).detach().contiguous().cpu() for k, v in tensors.items()}
    if not writes_files():
        return located(folder)
    return write_adapter(folder, description, state, companion_files(model, tokenizer))


def load_adapter(model: nn.Module, folder: Location, strict: bool = True) -> nn.Module:
    """Inject the methods of an adapter folder and load its values; the model is unchanged if anything is wrong.

    The adapter may come from a LightningModule and go to the bare network inside it, or the other way round. Names of
    classes that the folder has are those of the model's classifier from then on.

    Args:
        model: The base model, fresh or adapted by the same methods; in the latter case it may be sharded.
        folder: What ``save_adapter`` wrote, by path or address.
        strict: Whether the base must be the one that the adapter was trained on.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The folder is no adapter.
        ValueError: A file is damaged, or does not fit this model; says what and why.

    Examples:
        >>> import copy
        >>> base = nn.Sequential(nn.Linear(16, 8), nn.ReLU())
        >>> trained = lp.inject(copy.deepcopy(base), lp.LoRA(rank=2, init="gaussian", targets=["0"]))
        >>> loaded = lp.load_adapter(base, lp.save_adapter(trained, "my-adapter"))
        >>> torch.equal(loaded[0].peft["lora"].a, trained[0].peft["lora"].a)
        True
    """
    config, state = read_adapter(folder)
    fresh = get_record(model) is None
    try:
        with limit_allocation(sum(tensor.numel() for tensor in state.values())):
            inject_from_metadata(model, config, str(folder), strict)
        load_values(model, state, str(folder))
        set_class_names(model, config.get(CLASS_NAMES, ()))
    except Exception:
        if fresh:
            detach(model)
        raise
    return model


def load_values(
    model: nn.Module, state: Mapping[str, Tensor], source: str, only: Sequence[Method] | None = None
) -> None:
    """Load a state of ``adapter_state(model, True, only)``; if it does not fit, raise and load nothing."""
    state = align_state(model, state, source, only)
    target = {strip_wrapper_names(k): v for k, v in adapter_state(model, only=only).items()}
    for key, value in state.items():
        assign(target[key], value)
    warn_of_nonfinite(state, source)
    require_record(model).mark_trained()


def align_state(
    model: nn.Module, state: Mapping[str, Tensor], source: str, only: Sequence[Method] | None = None
) -> dict[str, Tensor]:
    """Convert a state of ``adapter_state(model, True, only)`` into one of ``adapter_state(model, only=only)``.

    Raises:
        ValueError: It does not fit; says how.
    """
    keys = align_keys(state, map(strip_wrapper_names, adapter_state(model, packed=True, only=only)))
    if len(keys) == len(state):  # else some lie elsewhere; they stay as they are, and ``check_state`` names them
        state = {keys[key]: value for key, value in state.items()}
    state = unpacked(model, state, only)
    check_state(model, state, source, only)
    if extra := state.keys() - {strip_wrapper_names(key) for key in adapter_state(model, only=only)}:
        raise ValueError(f"{source} has values of {sorted(extra)[:5]}, which this model has not or does not train.")
    return state
