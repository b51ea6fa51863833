"""Experts in folders of HF PEFT (``target_parameters``), against installed peft, both ways."""

import importlib.util
import json

import expert_models
import pytest
import torch
from expert_models import EXPERTS, batch
from models import BEFORE_5
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_peft as lp

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
    pytest.mark.skipif(BEFORE_5, reason="experts are modules before transformers 5"),
    pytest.mark.filterwarnings("ignore"),  # peft's own advice, and what it calls
]
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def expert_model(name):
    """Return a model in float64, where differences are no rounding."""
    return expert_models.expert_model(name, dtype=torch.float64)


def peft_model(name, **settings):
    import peft

    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": [], "init_lora_weights": False, **settings}
    model = peft.get_peft_model(expert_model(name), peft.LoraConfig(**settings))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def through_peft(name, folder):
    import peft

    return peft.PeftModel.from_pretrained(expert_model(name), folder).eval()


def randomize(model):
    torch.manual_seed(0)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def answer(model):
    """Return what the blocks hand on, and the logits; the norm before these rounds to float32."""
    output = model(batch(), output_hidden_states=True)
    return torch.cat([*(x.flatten() for x in output.hidden_states[1:-1]), output.logits.flatten()])


def require_equal(what, found, expected):
    y, z, base = answer(found), answer(expected), answer(expert_model(what.partition(",")[0]))
    difference = (y - z).abs().max().item()
    print(f"{what}: largest difference {difference:.1e} of {z.abs().max():.1f}")
    assert difference < 1e-12
    assert (z - base).abs().max() > 0.01


# Weights are stored (out, in) in Mixtral and (in, out) in Llama 4; the others add no layout.
QUICK = ("mixtral", "llama4_text")
MODELS_OF_EXPERTS = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EXPERTS]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": [UP, DOWN]},
        {"target_parameters": [DOWN], "use_rslora": True},
        {"target_parameters": [f"layers.1.mlp.{UP}"]},
        {"target_parameters": [UP, DOWN], "target_modules": ["o_proj"], "rank_pattern": {DOWN: 2}},
        {"target_parameters": [UP, DOWN], "alpha_pattern": {UP: 7}},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS_OF_EXPERTS)
def test_what_peft_trained_computes_the_same_here(name, settings, tmp_path):
    if name == "llama4_text":
        settings = {**settings, "target_parameters": [t.replace("mlp", "feed_forward")
                                                      for t in settings["target_parameters"]]}  # fmt: skip
    theirs = peft_model(name, **settings)
    theirs.save_pretrained(tmp_path)
    ours = lp.import_peft(expert_model(name), tmp_path)
    require_equal(f"{name}, from peft", ours, theirs)
    lp.export_peft(ours, tmp_path / "back")
    require_equal(f"{name}, and back", through_peft(name, tmp_path / "back"), theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["experts.up", "experts.down"]},
        {"targets": ["all-linear"], "scaling": "rank_stabilized"},
        {"targets": ["experts.down", "o_proj"], "alpha_pattern": {"o_proj": 3}},
        {"targets": ["experts.up"], "exclude": ["layers.0.*"], "init": "pissa"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS_OF_EXPERTS)
def test_what_was_trained_here_computes_the_same_in_peft(name, settings, tmp_path):
    settings = (
        {"rank": 3, "alpha": 5, "exclude": ["shared_experts.*"], **settings} if name == "deepseek_v3" else settings
    )
    ours = randomize(lp.inject(expert_model(name), lp.LoRA(**{"rank": 3, "alpha": 5, **settings})))
    lp.export_peft(ours, tmp_path)
    require_equal(f"{name}, to peft", through_peft(name, tmp_path), ours)
    again = lp.import_peft(expert_model(name), tmp_path)
    require_equal(f"{name}, and back", again, ours)


def test_a_folder_has_the_tensors_that_peft_writes(tmp_path):
    peft_model("mixtral", target_parameters=[UP, DOWN]).save_pretrained(tmp_path / "theirs")
    ours = lp.inject(expert_model("mixtral"), lp.LoRA(targets=["experts.up", "experts.down"], rank=3))
    lp.export_peft(ours, tmp_path / "ours")
    shapes = [
        {key: value.shape for key, value in load_file(tmp_path / side / "adapter_model.safetensors").items()}
        for side in ("theirs", "ours")
    ]
    assert shapes[0] == shapes[1]
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["down_proj", "gate_up_proj"]
    assert config["target_modules"] == []
    assert [s for s in lp.vllm_problems(tmp_path / "ours") if "target_parameters" in s]


def test_layers_that_peft_takes_for_experts_are_not_exported(tmp_path):
    ours = lp.inject(expert_model("deepseek_v3"), lp.LoRA(targets=["shared_experts.up_proj"], rank=3))
    with pytest.raises(ValueError, match="shared_experts.up_proj.* takes layers of these names for the fused experts"):
        lp.export_peft(ours, tmp_path / "none")


def test_dropout_on_experts_is_not_exported(tmp_path):
    ours = lp.inject(expert_model("mixtral"), lp.LoRA(targets=["experts.up"], rank=3, dropout=0.1))
    with pytest.raises(ValueError, match="Dropout on experts cannot be exchanged"):
        lp.export_peft(ours, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_missing_tensors_and_other_parameters_are_refused(tmp_path):
    peft_model("mixtral", target_parameters=[UP, DOWN]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "base_layer" not in key}, file)
    model = expert_model("mixtral")
    with pytest.raises(ValueError, match=r"settings adapt \['gate_up_proj', 'down_proj'\] of model.layers.0.mlp.exp"):
        lp.import_peft(model, tmp_path)
    save_file(tensors, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": ["gate.weight"]}))
    with pytest.raises(ValueError, match="mlp.gate"):
        lp.import_peft(model, tmp_path)
    assert not list(lp.adapters(model))
