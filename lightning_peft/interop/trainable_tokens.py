"""``TrainableTokensFormat``, and rows of tokens beside a LoRA: ``trainable_tokens_delta`` is rows, no difference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..methods import TrainableTokens
from ..methods.families.token_rows import TokenLayer, TokenRows
from ..methods.trainable_tokens import sharing_layers
from ..ops.sharded_tensors import full_tensor
from ..structure.base_model import base_modules
from ..structure.transformers_api import from_config, input_embeddings
from . import targets
from .module_names import exact_globs, join_names
from .peft_format import Base, PeftFile, PeftFormat, StateDict, check_supported

SETTING = "trainable_token_indices"  # of a LoRA
_ROWS = "trainable_tokens_delta"
IdsAndRows = tuple[list[int], torch.Tensor]
BESIDE = f"token_adapter.{_ROWS}"  # in the files of a LoRA


class TrainableTokensFormat(PeftFormat):
    """Layers that share the weight of the input embeddings have copies of the rows there, but not beside a LoRA."""

    kind, method, tensors = "TRAINABLE_TOKENS", TrainableTokens, (_ROWS,)
    settings = ("token_indices", "target_modules")
    ignored_settings = ("init_weights",)

    def to_peft(
        self, base: Base, method: TrainableTokens, hosts: Mapping[str, Sequence[TokenLayer]]
    ) -> tuple[dict[str, Any], StateDict]:
        rows = _rows_by_host(base, hosts)
        by_default = _are_input_embeddings(base, list(rows))
        settings = {"target_modules": None} if by_default else targets.target_settings(base, rows)
        check_supported("exclude_modules" in settings, f"Rows of {', '.join(rows)} alone", "names of others end alike")
        copies = {name: full_tensor(adapter.trained_rows()).detach().clone() for name, (adapter, *_) in hosts.items()}
        state = {f"{self.prefix}{name}.{_ROWS}": values for name, values in copies.items()}
        return settings | {"token_indices": list(method.tokens)}, state

    def expected(self, base: Base, file: PeftFile) -> Iterator[str]:
        return iter(()) if file.config.get("target_modules") is None else targets.target_hosts(base, file.config)

    def from_peft(
        self, base: Base, file: PeftFile, name: str
    ) -> Iterator[tuple[TrainableTokens, Mapping[str, StateDict]]]:
        ids = list(file.get("token_indices", []))
        return _methods(base, {host: (ids, tensors[_ROWS]) for host, tensors in file.state.items()}, name)


def beside(base: Base, hosts: Mapping[str, Sequence[TokenLayer]], prefix: str) -> tuple[dict[str, Any], StateDict]:
    """Return the setting and the tensors by which the files of a LoRA hold rows of tokens."""
    rows = _rows_by_host(base, hosts)
    state = {f"{prefix}{name}.{BESIDE}": full_tensor(adapter.weight).detach() for name, adapter in rows.items()}
    return {SETTING: {name: list(adapter.ids) for name, adapter in rows.items()}} if rows else {}, state


def read_beside(
    base: Base, file: PeftFile, name: str
) -> tuple[PeftFile, list[tuple[TrainableTokens, Mapping[str, StateDict]]]]:
    """Return the file of a LoRA without rows of tokens, and the methods and states that these are here.

    Args:
        base: Base model.
        file: The file.
        name: Name for the methods; they are numbered where layers have rows of different tokens.
    """
    indices = file.get(SETTING, {})
    rows = {host: tensors[BESIDE] for host, tensors in file.state.items() if BESIDE in tensors}
    _check_complete(base, indices, rows)
    ids_and_rows = {host: (_ids_of(host, indices), values) for host, values in rows.items()}
    state = {host: {k: v for k, v in tensors.items() if k != BESIDE} for host, tensors in file.state.items()}
    rest = {host: tensors for host, tensors in state.items() if tensors}
    return PeftFile(file.config, rest), list(_methods(base, ids_and_rows, name))


def _check_complete(base: Base, indices: Any, rows: Mapping[str, torch.Tensor]) -> None:
    """Raise where the settings train rows of a layer for which the file has none, and no layer that shares them."""
    weights = {id(getattr(base.network.get_submodule(host), "weight", None)) for host in rows}
    keys = indices if isinstance(indices, Mapping) else [""] * bool(indices)
    modules = base_modules(base.network)
    for key in keys:
        named = [m for n, m in modules.items() if n == key or n.endswith(f".{key}")] if key else []
        if not rows or (key and not any(id(getattr(module, "weight", None)) in weights for module in named)):
            raise ValueError(f"The file sets {SETTING}={indices}, but it has no rows of {key or 'these tokens'}.")


def _ids_of(host: str, indices: Any) -> list[int]:
    if isinstance(indices, Mapping):
        every = list(indices.values())
        fitting = [ids for key, ids in indices.items() if host == key or host.endswith(f".{key}")]
        indices = next(iter(fitting or (every if len(every) == 1 else [])), [])
    check_supported(not indices, f"Rows of tokens in {host}", f"{SETTING} does not say whose they are")
    return list(indices)


def _methods(
    base: Base, rows: Mapping[str, IdsAndRows], name: str
) -> Iterator[tuple[TrainableTokens, Mapping[str, StateDict]]]:
    """Yield a method for each list of ids, with the rows by host, which are put in ascending order of ids."""
    hosts_by_ids = defaultdict[tuple[int, ...], list[str]](list)
    for host, (ids, values) in (rows := _without_ties(base, rows)).items():
        if len(set(ids)) != len(ids) or len(ids) != len(values):
            raise ValueError(f"The file has {len(values)} rows for {host} and names the tokens {ids}.")
        hosts_by_ids[tuple(sorted(ids))].append(host)
    for number, (tokens, hosts) in enumerate(hosts_by_ids.items(), 1):
        by_default = _are_input_embeddings(base, hosts)
        globs, surplus = exact_globs([join_names(base.name, host) for host in hosts], base.model)
        check_supported(bool(surplus) and not by_default, f"Rows of {hosts} alone", "names of others end alike")
        states = {join_names(base.name, host): {"weight": _ascending(*rows[host])} for host in hosts}
        method_name = name if number == 1 else f"{name}_{number}"
        yield TrainableTokens(name=method_name, tokens=list(tokens), targets=[] if by_default else globs), states


def _are_input_embeddings(base: Base, hosts: Sequence[str]) -> bool:
    """Return whether these are the layer that both sides take where none is named."""
    return [base.network.get_submodule(host) for host in hosts] == [input_embeddings(base.network)]


def _without_ties(base: Base, rows: Mapping[str, IdsAndRows]) -> dict[str, IdsAndRows]:
    """Return ids and rows once for layers that share a weight, under the name of the first."""
    first_of = dict[str, IdsAndRows]()
    for host, (ids, values) in rows.items():
        weight = getattr(base.network.get_submodule(host), "weight", None)
        name, _ = next(iter(sharing_layers(base.network, {id(weight)})), (host, None))
        others = first_of.setdefault(name, (ids, values))
        if ids != others[0] or not torch.equal(values, others[1]):
            raise ValueError(f"The file has other rows for {host} than for {name}, and they share one weight here.")
    return first_of


def _ascending(ids: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    return values[torch.tensor(ids).argsort()]


def _rows_by_host(base: Base, hosts: Mapping[str, Sequence[TokenLayer]]) -> dict[str, TokenRows]:
    """Return the adapters that have rows of their own; refuse ties that HF PEFT does not follow."""
    own = dict[str, TokenRows]()
    for name, (adapter, *_) in hosts.items():
        if isinstance(adapter, TokenRows):
            own[name] = adapter
            continue
        host: Any = base.network.get_submodule(name)
        tied = from_config(base.network, "tie_word_embeddings")
        check_supported(not tied, f"Rows of {name}", "it follows ties that the configuration names alone")
        has_bias = isinstance(host, nn.Linear) and host.bias is not None
        check_supported(has_bias, f"Rows of the tied {name}", "it leaves out the bias of such a head")
    return own
