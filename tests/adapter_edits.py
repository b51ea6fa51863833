"""Other values for adapters, in a model and in their files."""

import hashlib
import json

import torch
from safetensors.torch import load_file, save_file

import lightning_peft as lp
from lightning_peft.files.checksums import settings_digest
from lightning_peft.files.safetensors_header import with_metadata

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def stir(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for *_, adapter in lp.adapters(net):
        for p in adapter.parameters():
            p.data.add_(0.2 * torch.randn(p.shape, generator=generator))


def edit_json(folder, **changes):
    """Change settings, and their checksum with them."""
    config = {**json.loads((folder / CONFIG).read_text()), **changes}
    sign(folder, {key: value for key, value in config.items() if key != "sha256"})


def sign(folder, config):
    """Write settings with a right checksum."""
    metadata = {"settings_sha256": settings_digest(config)}
    (folder / WEIGHTS).write_bytes(with_metadata((folder / WEIGHTS).read_bytes(), metadata))
    config = {**config, "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()}
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    edit_json(folder)
