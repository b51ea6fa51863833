"""``import_peft`` injects and loads the adapter in a folder of HF PEFT."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from ..checkpoints.companion_files import read_class_names
from ..files.storage import Location
from ..structure.class_names import set_class_names
from . import modules_to_save as saved
from .compatibility import check_hosts, check_tensors
from .experts import NESTED
from .load_imported import inject_and_load
from .peft_folder import changed, read_with_checksum
from .peft_format import PeftFile, PeftFormat, StateDict
from .peft_formats import FORMATS
from .renamed_modules import base_of_file, rename_hosts


def import_peft(model: nn.Module, folder: Location, name: str | None = None) -> nn.Module:
    """Inject the adapter of a HF PEFT folder and load its values; the model is unchanged if anything is wrong.

    What trained beside it, such as a head or biases, becomes the adapter's own: copies that take the place of the
    base's parameters while it is active, under one name with it. The base stays as it is, tied weights included.

    Modules that another release of transformers, or a model with another head, calls otherwise are found by the rules
    by which transformers loads weights.

    Args:
        model: The base model, or a module that holds it.
        folder: What ``save_pretrained`` of HF PEFT wrote, by path or address: safetensors, or an old ``.bin`` of
            tensors alone.
        name: Name for the method; by default the name that our method has.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The folder is no adapter.
        ValueError: A file is damaged, does not fit this model, or asks for what no method here computes.

    Examples:
        >>> trained = lp.inject(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), lp.LoRA(rank=2, targets=["0"]))
        >>> folder = lp.export_peft(trained, "for-peft")  # or HF PEFT's save_pretrained
        >>> model = lp.import_peft(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), folder)
        >>> torch.equal(model[0].peft["lora"].a, trained[0].peft["lora"].a)
        True
    """
    config, tensors, unchanged = read_with_checksum(folder)
    peft_format = next((f for f in FORMATS if f.kind == config["peft_type"]), None)
    if peft_format is None:
        readable = ", ".join(f.kind for f in FORMATS)
        raise ValueError(f"{folder} is a {config['peft_type']} adapter, which is not read. Read are: {readable}.")
    if unknown := peft_format.unknown(config):
        raise ValueError(f"{folder} sets {unknown}, which may change what it computes and is not known here.")
    states, other_tensors = split_by_host(peft_format, tensors)
    check_tensors(states, str(folder))
    base = base_of_file(model, states)
    file = rename_hosts(base, PeftFile(config, states))
    check_hosts(base, peft_format, file)
    trained = saved.read_trained(base, file.config, other_tensors)
    plan = list(peft_format.from_peft(base, file, name or peft_format.name))
    names = read_class_names(folder)
    tied, refusal = bool(file.config.get(saved.TIED)), None if unchanged else changed(folder)
    inject_and_load(base, plan, trained, str(folder), tied=tied, refusal=refusal)
    set_class_names(model, names)
    return model


def split_by_host(peft_format: PeftFormat, tensors: StateDict) -> tuple[dict[str, StateDict], StateDict]:
    """Return the format's tensors by host, and the others."""
    hosts, others = defaultdict[str, StateDict](dict), StateDict()
    for key, value in sorted(tensors.items()):
        name = key.removeprefix(peft_format.prefix)
        suffix = next((suffix for suffix in peft_format.tensors if f".{name}".endswith(f".{suffix}")), None)
        if suffix is None:
            others[name] = value
        else:
            host = name.removesuffix(suffix).rstrip(".")
            while host.endswith(f".{NESTED}".rstrip(".")):  # one of several adapted parameters of a module
                host, suffix = host.removesuffix(f".{NESTED}".rstrip(".")), NESTED + suffix
            hosts[host][suffix] = value
    return dict(hosts), others
