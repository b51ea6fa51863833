"""Other values for adapters, in a model and in their files."""

import hashlib
import json

import torch
from safetensors.torch import load_file, save_file

import lightning_peft as lp

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def stir(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for *_, adapter in lp.adapters(net):
        for p in adapter.parameters():
            p.data.add_(0.2 * torch.randn(p.shape, generator=generator))


def edit_json(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    edit_json(folder, sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())
