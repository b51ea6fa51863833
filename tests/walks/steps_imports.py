"""The step that imports a folder of HF PEFT, which is made here from random numbers."""

import json

import torch
from safetensors.torch import save_file

import lightning_peft as lp
from walks.state import Placed, together
from walks.steps_adapters import free_name, names_are_free


def import_peft(walk, name):
    """A LoRA of rank 2 on ``up``, as HF PEFT writes it; it is active from then on."""
    state, tensors = walk.state, peft_tensors()
    folder = walk.folder / "peft"
    if not folder.is_dir():
        folder.mkdir()
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["up"], "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        keys = {"a": "lora_A", "b": "lora_B"}
        save_file(
            {f"base_model.model.up.{keys[k]}.weight": t for k, t in tensors.items()},
            folder / "adapter_model.safetensors",
        )
    dtype = torch.promote_types(state.base["up.weight"].dtype, torch.float32)
    spec = {"name": name, "kind": "lora", "targets": ("up",), "rank": 2, "alpha": 3.0}
    placed = Placed(spec, {"up": {key: t.to(dtype) for key, t in tensors.items()}})
    legal = not state.merged and names_are_free(state, [placed]) and together([*state.active_methods(), placed])
    if walk.attempt(legal, lambda: lp.import_peft(walk.model, folder, name)) is not None:
        state.injected = True
        state.methods.append(placed)
        state.active.append(name)


def peft_tensors():
    generator = torch.Generator().manual_seed(11)
    return {"a": 0.5 * torch.randn(2, 4, generator=generator), "b": 0.5 * torch.randn(6, 2, generator=generator)}


IMPORT_STEPS = {
    "import_peft": (lambda rng, walk: (free_name(rng, walk),), import_peft, 4),
}
