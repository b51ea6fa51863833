"""Folders of HF PEFT, in."""

from __future__ import annotations

import os
from collections import defaultdict

from torch import nn

from . import modules_to_save as saved
from .compatibility import check_hosts
from .load_imported import inject_and_load
from .module_names import network
from .peft_folder import read_folder
from .peft_format import Base, File, PeftFormat, State
from .peft_formats import FORMATS


def import_peft(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> nn.Module:
    """Inject the adapter of a HF PEFT folder and load its values; the model is unchanged if anything is wrong.

    Args:
        model: The base model, or a module that holds it.
        folder: What ``save_pretrained`` of HF PEFT wrote; safetensors, or an old ``.bin`` of tensors alone.
        name: Name for the method; by default the name that our method has.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The folder is no adapter.
        ValueError: A file is damaged, does not fit this model, or asks for what no method here computes.
    """
    config, tensors = read_folder(folder)
    family = next((f for f in FORMATS if f.kind == config["peft_type"]), None)
    if family is None:
        known = ", ".join(f.kind for f in FORMATS)
        raise ValueError(f"{folder} is a {config['peft_type']} adapter, which is not read. Read are: {known}.")
    if unknown := family.unknown(config):
        raise ValueError(f"{folder} sets {unknown}, which may change what it computes and is not known here.")
    base = Base(model, *network(model))
    hosts, rest = parted(family, tensors)
    check_hosts(base, family, File(config, hosts))
    values = saved.read(base, config, rest)
    plan = list(family.read(base, File(config, hosts), name or family.name))
    inject_and_load(base, plan, values, str(folder))
    return model


def parted(family: PeftFormat, tensors: State) -> tuple[dict[str, State], State]:
    """Return the family's tensors by host, and the others."""
    hosts, rest = defaultdict[str, State](dict), State()
    for key, value in sorted(tensors.items()):
        name = key.removeprefix(family.prefix)
        end = next((end for end in family.tensors if f".{name}".endswith(f".{end}")), None)
        if end is None:
            rest[name] = value
        else:
            hosts[name.removesuffix(end).rstrip(".")][end] = value
    return dict(hosts), rest
