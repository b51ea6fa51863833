"""``import_loralib`` and ``import_t_few`` read checkpoints of the authors' code, which hold tensors and no settings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..files.storage import Location
from ..methods import IA3
from ..structure.fused_rows import fused_rows, is_fused
from ..structure.layer_of import layer_of
from .compatibility import check_module_names
from .factors import alpha_for_scale
from .load_imported import inject_and_load
from .lora import lora_from_factors
from .module_names import exact_globs, join_names
from .modules_to_save import read_all_trained
from .peft_folder import read_tensor_file
from .peft_format import PeftFile, StateDict
from .renamed_modules import base_of_file, rename_hosts


def import_loralib(
    model: nn.Module, path: Location, alpha: float, parts: Sequence[str] = ("query", "value")
) -> nn.Module:
    """Inject and load LoRA from a checkpoint of the authors' loralib (https://github.com/microsoft/LoRA).

    That of LitGPT is read as well, for a model of its layers' names, where query, key and value have rows one below the
    other (``qkv``); older ones, where the rows of heads alternate (``attn.attn``), are refused. Heads and biases in the
    checkpoint are loaded, and train. The model is unchanged if anything is wrong.

    Args:
        model: The base model, or a module that holds it.
        path: File of ``torch.save(lora_state_dict(model))``, or of tensors below ``model``.
        alpha: The ``lora_alpha`` of training, which the file does not hold: 16 in the authors' scripts for RoBERTa, 32
            for GPT-2.
        parts: Of layers that compute query, key and value at once, those that were adapted (``enable_lora``).

    Returns:
        The model.

    Raises:
        ValueError: The file is damaged, or does not fit this model.

    Examples:
        >>> model = nn.ModuleDict({"query": nn.Linear(16, 16)})
        >>> torch.save({"query.lora_A": torch.ones(2, 16), "query.lora_B": torch.zeros(16, 2)}, "lora.pt")
        >>> _ = lp.import_loralib(model, "lora.pt", alpha=4)
        >>> model["query"].peft["lora"].scale  # alpha / rank
        2.0
    """
    hosts, other_tensors = _by_host(read_tensor_file(path), {"lora_A": "a", "lora_B": "b"})
    base = base_of_file(model, hosts)
    hosts = dict(rename_hosts(base, PeftFile({}, hosts)).state)
    check_module_names(base, hosts)
    states, alphas = dict[str, StateDict](), dict[str, float]()
    for host, factors in hosts.items():
        _check_factors(host, factors, str(path))
        module = base.network.get_submodule(host)
        rank = factors["b"].shape[1] // (module.kernel_size[0] if isinstance(module, nn.Conv2d) else 1)
        states[host] = _whole_layer_factors(module, host, factors, parts)
        alphas[host] = alpha_for_scale(alpha / rank, len(states[host]["a"]))
    inject_and_load(
        base, [lora_from_factors(base, "lora", states, alphas)], read_all_trained(base, other_tensors), str(path)
    )
    return model


def import_t_few(model: nn.Module, path: Location) -> nn.Module:
    """Inject and load (IA)3 from a checkpoint of T-Few (https://github.com/r-three/t-few).

    Its vectors scale outputs of keys, values and ``wi_1``. The model is unchanged if anything is wrong.

    Args:
        model: The base model, or a module that holds it.
        path: The ``finish.pt`` of a run.

    Returns:
        The model.

    Raises:
        ValueError: The file is damaged, or does not fit this model.

    Examples:
        >>> model = nn.ModuleDict({"k": nn.Linear(16, 8), "wi_1": nn.Linear(16, 32)})
        >>> state = {"k.multi_lora_b": torch.ones(8, 1), "wi_1.multi_lora_b": torch.ones(32, 1)}
        >>> torch.save(state, "finish.pt")
        >>> lp.summary(lp.import_t_few(model, "finish.pt")).trainable
        40
    """
    hosts, other_tensors = _by_host(read_tensor_file(path), {"multi_lora_b": "scales"})
    base = base_of_file(model, hosts)
    hosts = dict(rename_hosts(base, PeftFile({}, hosts)).state)
    check_module_names(base, hosts)
    for host, tensors in hosts.items():
        if (
            tensors["scales"].numel()
            != layer_of(base.network.get_submodule(host)).shape(base.network.get_submodule(host))[0]
        ):
            raise ValueError(f"{path} has {tensors['scales'].numel()} scales for {host}, which has other outputs.")
    states = {join_names(base.name, host): {"scales": tensors["scales"].flatten()} for host, tensors in hosts.items()}
    targets, exclude = exact_globs(states, model)
    method = IA3(targets=targets, feedforward_targets=[], exclude=exclude)
    inject_and_load(base, [(method, states)], read_all_trained(base, other_tensors), str(path))
    return model


def _by_host(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> tuple[dict[str, StateDict], StateDict]:
    hosts, other_tensors = defaultdict[str, StateDict](dict), StateDict()
    for key, value in tensors.items():
        host, _, suffix = key.rpartition(".")
        if suffix in names:
            hosts[host][names[suffix]] = value
        else:
            other_tensors[key] = value
    if not hosts:
        raise ValueError(f"No key ends in {' or '.join(names)}, as the tensors of such an adapter do.")
    return dict(hosts), other_tensors


def _check_factors(host: str, factors: StateDict, path: str) -> None:
    """Raise where a host has not two matrices of one rank."""
    if factors.keys() != {"a", "b"}:
        raise ValueError(f"{path} has only {sorted(factors)} of the two factors of {host}.")
    a, b = factors["a"], factors["b"]
    whole = a.dim() == b.dim() == 2 and a.is_floating_point() and b.is_floating_point()
    if not whole or 0 in (*a.shape, *b.shape) or len(a) % b.shape[1]:
        raise ValueError(
            f"{path} is damaged: the factors of {host} have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected "
            f"matrices A (rank, inputs) and B (outputs, rank) of numbers, of rank 1 or more."
        )


def _whole_layer_factors(host: nn.Module, name: str, factors: StateDict, wanted: Sequence[str]) -> StateDict:
    """Return factors for a whole layer; of a fused one, A of projections lie below each other, B on the diagonal."""
    a, b = factors["a"], factors["b"]
    out, *shape = layer_of(host).shape(host)
    if isinstance(host, nn.Conv2d):
        return _convolution_factors(name, a, b, out, shape)
    count, rank = len(a) // b.shape[1], b.shape[1]
    if count == 1 and len(b) == out:
        return factors
    if not is_fused(name, host):
        raise ValueError(f"{name} has factors of {count} parts, whose order among its rows is not known.")
    rows = {part.part: part for part in fused_rows(host, name)}
    if count != len(wanted) or any(part not in rows for part in wanted):
        raise ValueError(f"{name} has factors of {count} parts, but parts={list(wanted)!r}; name those adapted.")
    if (size := sum(rows[part].size for part in wanted)) != len(b):
        raise ValueError(f"{name} has {len(b)} rows of B, expected {size} for {list(wanted)!r}.")
    full_b, row = b.new_zeros(out, len(a)), 0
    for number, part in enumerate(sorted(wanted, key=lambda part: rows[part].start)):
        of_part = b[row : row + rows[part].size]
        full_b[:, number * rank : (number + 1) * rank] = rows[part].pad(of_part.mT, out).mT
        row += rows[part].size
    return {"a": a, "b": torch.clone(full_b)}


def _convolution_factors(name: str, a: Tensor, b: Tensor, out: int, shape: Sequence[int]) -> StateDict:
    """Return factors for a kernel (out, *shape) that is the product B A seen otherwise, which has no low rank."""
    if len(b) * a.shape[1] != out * math.prod(shape):
        raise ValueError(
            f"{name} has factors {tuple(a.shape)} and {tuple(b.shape)}, whose product is no ({out}, {shape})."
        )
    product, limit = (b @ a).reshape(out, -1), min(out, math.prod(shape))
    eye = torch.eye(limit, dtype=a.dtype)
    a, b = (product, eye) if limit == out else (eye, product)
    return {"a": a.reshape(-1, *shape), "b": b}
