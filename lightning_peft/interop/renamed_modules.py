"""``rename_hosts`` gives the modules of a file the names that they have in a model, by the rules of transformers.

Releases of transformers rename modules (``language_model.model.layers`` became ``model.language_model.layers``), and a
backbone has other names than the model with a head around it. Weights are renamed in loading; so are adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from ..structure.transformers_loading import names_by_loading
from . import targets
from .module_names import find_network, pretrained_networks
from .peft_format import Base, PeftFile, StateDict

_BY_NAME = ("rank_pattern", "alpha_pattern")  # settings that map regular expressions to values
_MODULES = ("feedforward_modules",)  # lists of ends of names, or a regular expression
_NAMES = ("target_modules", "exclude_modules", "modules_to_save")  # lists in which whole names can occur


def name_in(base: Base, known: Collection[str], ending: str = "") -> Callable[[str], str]:
    """Return a function from a name in a file to the name of the same in the network; unknown names stay as they are.

    Args:
        base: Base model.
        known: Names that the network has, of modules or of tensors.
        ending: Of names of modules, what makes them names of their tensors.
    """
    rename = names_by_loading(base.network, known, ending)

    def place(name: str) -> str:
        new = name if name in known else rename(name)
        return new if new in known else name

    return place


def rename_hosts(base: Base, file: PeftFile) -> PeftFile:
    """Return a file whose hosts, and settings by host, have the names of the network where only these differ.

    Raises:
        ValueError: Two modules of the file are one in the network.
    """
    place = name_in(base, dict(base.network.named_modules()), ".weight")
    names = {host: place(host) for host in file.state}
    if all(host == name for host, name in names.items()):
        return file
    state = dict[str, StateDict]()
    for host, tensors in file.state.items():
        if names[host] in state:
            both = [other for other, name in names.items() if name == names[host]]
            raise ValueError(f"The file has tensors of {both}, which are one module of the model, {names[host]}.")
        state[names[host]] = tensors
    return PeftFile(_renamed_settings(file.config, names, place), state)


def _renamed_settings(
    config: Mapping[str, Any], names: Mapping[str, str], place: Callable[[str], str]
) -> dict[str, Any]:
    settings = dict(config)
    for setting in _BY_NAME:  # of the name in the file, which is what they were written for, or else of the new one
        pattern = config.get(setting) or {}
        of_new = {name: targets.by_pattern(pattern, name, None) for name in names.values()}
        found = {name: targets.by_pattern(pattern, host, of_new[name]) for host, name in names.items()}
        settings[setting] = {re.escape(name): value for name, value in found.items() if value is not None}
    for setting in _MODULES:
        if pattern := config.get(setting):
            settings[setting] = [
                n for h, n in names.items() if targets.ends_like(h, pattern) or targets.ends_like(n, pattern)
            ]
    for setting in _NAMES:
        if isinstance(config.get(setting), list):
            settings[setting] = [place(name) for name in config[setting]]
    return settings


def base_of_file(model: nn.Module, hosts: Collection[str]) -> Base:
    """Return the base for a file that adapts these modules: the transformers model that has them.

    Raises:
        ValueError: Several have them.
    """
    networks = pretrained_networks(model)
    known = dict(model.named_modules())
    if len(networks) < 2 or (any(hosts) and all(host in known for host in hosts)):
        return Base(model, *find_network(model))
    bases = [Base(model, name, network) for name, network in networks.items()]
    fitting = [base for base in bases if _has_all(base, hosts)]
    if len(fitting) > 1:
        names = ", ".join(base.name for base in fitting)
        raise ValueError(
            f"The file fits {names} in this {type(model).__name__}. Give one of them, such as {fitting[0].name}, "
            f"instead of the module that holds them."
        )
    return fitting[0] if fitting else Base(model, "", model)


def _has_all(base: Base, hosts: Collection[str]) -> bool:
    modules = dict(base.network.named_modules())
    place = name_in(base, modules, ".weight")
    return all(place(host) in modules for host in hosts)
