"""Folders whose modules have other names: of another release, of another head, of one network of several."""

import importlib.util
import json

import pytest
import torch
from models import MODELS, logits, tokens
from peft_models import disturbed
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_peft as lp

transformers = pytest.importorskip("transformers")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = 90  # token that stands for a patch of an image


def llava():
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, pad_token_id=0),
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=32, patch_size=8),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def see(model):
    ids = torch.arange(1, 21)[None]
    ids[:, 2:18] = IMAGE
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def read(model):
    with torch.no_grad():
        return model.eval()(tokens())


def rename(folder, **by_prefix):
    """Give keys of a folder other beginnings, as an older release would have written them."""
    path, begin = folder / "adapter_model.safetensors", "base_model.model."
    renamed = {}
    for key, value in load_file(path).items():
        name = key.removeprefix(begin)
        old = next((prefix for prefix in by_prefix.values() if name.startswith(prefix)), None)
        if old is not None:
            new = next(new for new, prefix in by_prefix.items() if prefix == old)
            name = new.replace("__", ".") + name.removeprefix(old)
        renamed[begin + name] = value.clone()
    save_file(renamed, path)


def rename_as_before_5(folder):
    rename(
        folder,
        language_model__model="model.language_model",
        language_model__lm_head="lm_head",
        vision_tower="model.vision_tower",
        multi_modal_projector="model.multi_modal_projector",
    )


METHODS = {
    "LoRA": lp.LoRA(
        rank=2, targets=["q_proj", "linear_1"], rank_pattern={"*layers.1.*": 3}, alpha_pattern={"*.0.*": 7}
    ),
    "LoRA and a module": lp.LoRA(rank=2, targets=["language_model.layers.*.mlp.down_proj"]),
    "DoRA": lp.LoRA(rank=2, decompose=True, targets=["language_model.layers.1.self_attn.q_proj"]),
    "IA3": lp.IA3(targets=["k_proj"], feedforward_targets=["down_proj"]),
    "AdaLoRA": lp.AdaLoRA(initial_rank=3, target_rank=2, targets=["v_proj"]),
    "FedPara": lp.FedPara(rank=2, targets=["language_model.layers.*.self_attn.v_proj"]),
    "KronA": lp.KronA(targets=["language_model.layers.*.self_attn.v_proj"], factor=4),
}


@pytest.mark.parametrize("kind", METHODS)
def test_names_of_before_transformers_5_are_placed(kind, tmp_path):
    model = disturbed(lp.inject(llava(), METHODS[kind], ["lm_head"] if kind.endswith("module") else []))
    lp.export_peft(model, tmp_path)
    rename_as_before_5(tmp_path)
    found = see(lp.import_peft(llava(), tmp_path).eval())
    torch.testing.assert_close(found, see(model), atol=1e-5, rtol=0)
    assert (found - see(llava())).abs().max() > 1e-3


@needs_peft
def test_what_peft_reads_of_an_older_release_is_read_alike(tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "lm_head", "linear_1"], init_lora_weights=False)
    peft.get_peft_model(llava(), config).save_pretrained(tmp_path)
    rename_as_before_5(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llava(), tmp_path).eval()
    torch.testing.assert_close(see(lp.import_peft(llava(), tmp_path).eval()), see(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("setting", ["alpha_pattern", "exclude_modules"])
def test_settings_that_spell_old_names_mean_the_renamed_modules(setting, tmp_path):
    name, old = (f"{prefix}.layers.0.self_attn.q_proj" for prefix in ("model.language_model", "language_model.model"))
    choice = {"alpha_pattern": {name: 9.0}} if setting == "alpha_pattern" else {"exclude": [name]}
    model = disturbed(lp.inject(llava(), lp.LoRA(rank=2, targets=["q_proj"], **choice)))
    lp.export_peft(model, tmp_path)
    rename_as_before_5(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    if setting == "exclude_modules":
        config |= {"target_modules": ["q_proj"], "exclude_modules": [old]}
    else:
        assert config["alpha_pattern"] == {name: 9}
        config["alpha_pattern"] = {old: 9}
    path.write_text(json.dumps(config))
    torch.testing.assert_close(see(lp.import_peft(llava(), tmp_path).eval()), see(model), atol=1e-5, rtol=0)


def test_a_saved_module_that_is_spelled_by_its_old_name_is_found(tmp_path):
    model = disturbed(lp.inject(llava(), lp.LoRA(rank=2), ["lm_head"]))
    lp.export_peft(model, tmp_path)
    rename_as_before_5(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["modules_to_save"] == ["lm_head"]
    path.write_text(json.dumps(config | {"modules_to_save": ["language_model.lm_head"]}))
    back = lp.import_peft(llava(), tmp_path).eval()
    torch.testing.assert_close(see(back), see(model), atol=1e-5, rtol=0)
    assert back.lm_head.weight.requires_grad


def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, image_size=32, patch_size=8)).eval()


def neox():
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT)).eval()


OLDER = {  # maker, target, its old name
    "vit": (vit, "vit.layers.1.attention.q_proj", "vit.encoder.layer.1.attention.attention.query"),
    "neox": (neox, "lm_head", "embed_out"),
}


@pytest.mark.parametrize("name", OLDER)
def test_renamed_layers_of_other_models_are_placed(name, tmp_path):
    make, target, old = OLDER[name]
    if target not in dict(make().named_modules()):
        pytest.skip("this release of transformers has the old name")
    model = disturbed(lp.inject(make(), lp.LoRA(rank=2, targets=[target])))
    lp.export_peft(model, tmp_path)
    rename(tmp_path, **{old.replace(".", "__"): target})
    back = lp.import_peft(make(), tmp_path).eval()
    assert [host for host, *_ in lp.adapters(back)] == [target]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found, expected = ((m(pixels) if name == "vit" else m(tokens())).logits for m in (back, model))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_two_names_of_one_module_are_refused(tmp_path):
    lp.export_peft(lp.inject(llava(), lp.LoRA(rank=2, targets=["lm_head"])), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    more = {key.replace("lm_head", "language_model.lm_head"): value.clone() for key, value in state.items()}
    save_file(state | more, path)
    with pytest.raises(ValueError, match=r"\['language_model.lm_head', 'lm_head'\], which are one module of the model"):
        lp.import_peft(llava(), tmp_path)


@pytest.mark.parametrize(
    ("name", "also_train"), [("llama", ()), ("llama", ["norms"]), ("gpt2", ()), ("gpt2", ["norms"]), ("bert", ())]
)
def test_an_adapter_of_a_model_with_a_head_fits_its_backbone_and_the_other_way_round(name, also_train, tmp_path):
    torch.manual_seed(0)
    model = disturbed(lp.inject(MODELS[name](), lp.LoRA(rank=2), also_train))
    lp.export_peft(model, tmp_path / "whole")
    backbone = lp.import_peft(MODELS[name]().base_model, tmp_path / "whole")
    expected = model.base_model(tokens()).last_hidden_state
    torch.testing.assert_close(read(backbone).last_hidden_state, expected, atol=1e-5, rtol=0)
    lp.export_peft(backbone, tmp_path / "backbone")
    back = lp.import_peft(MODELS[name](), tmp_path / "backbone")
    torch.testing.assert_close(logits(read(back)), logits(read(model)), atol=1e-5, rtol=0)
    assert (logits(read(back)) - logits(read(MODELS[name]()))).abs().max() > 1e-3


def test_a_saved_head_does_not_fit_the_backbone(tmp_path):
    lp.export_peft(lp.inject(MODELS["bert"](), lp.LoRA(rank=2), ["classifier"]), tmp_path)
    backbone = MODELS["bert"]().bert
    with pytest.raises(ValueError, match="classifier.weight.*for which BertModel has no place"):
        lp.import_peft(backbone, tmp_path)
    assert not list(lp.adapters(backbone))


def test_an_adapter_of_a_head_does_not_fit_the_backbone(tmp_path):
    lp.export_peft(lp.inject(MODELS["llama"](), lp.LoRA(rank=2, targets=["lm_head", "q_proj"])), tmp_path)
    backbone = MODELS["llama"]().model
    with pytest.raises(ValueError, match=r"adapts \['lm_head'\], which the model has not"):
        lp.import_peft(backbone, tmp_path)
    assert not list(lp.adapters(backbone))
    assert all(p.requires_grad for p in backbone.parameters())


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.config = nn.Linear(4, 6), nn.Linear(6, 4), {}

    def forward(self, x):
        return self.two(self.one(x))


class Holder(nn.Module):
    def __init__(self, **networks):
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)


def test_a_prefix_that_alone_differs_is_named(tmp_path):
    lp.export_peft(lp.inject(Plain(), lp.LoRA(rank=2, targets=["one", "two"])), tmp_path)
    with pytest.raises(ValueError, match=r"Only a prefix differs: '' in the file is 'net\.' here"):
        lp.import_peft(Holder(net=Plain()), tmp_path)
    lp.export_peft(lp.inject(Holder(net=Plain()), lp.LoRA(rank=2, targets=["one", "two"])), tmp_path / "outer")
    with pytest.raises(ValueError, match=r"Only a prefix differs: 'net\.' in the file is '' here"):
        lp.import_peft(Plain(), tmp_path / "outer")


def pair(student="bert", teacher="bert"):
    return Holder(teacher=MODELS[teacher](), student=MODELS[student]())


def test_a_student_beside_its_teacher_is_exported_alone(tmp_path):
    torch.manual_seed(0)
    both = disturbed(lp.inject(pair(), lp.LoRA(rank=2, targets=["student.*.query"]), ["student.classifier"]))
    lp.export_peft(both, tmp_path)
    keys = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.classifier.weight" in keys
    assert not [key for key in keys if "student" in key]
    back = lp.import_peft(MODELS["bert"](), tmp_path)
    torch.testing.assert_close(logits(read(back)), logits(read(both.student)), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"fits teacher, student in this Holder\. Give one of them"):
        lp.import_peft(pair(), tmp_path)
    again = pair()
    lp.import_peft(again.student, tmp_path)
    torch.testing.assert_close(logits(read(again.student)), logits(read(both.student)), atol=0, rtol=0)
    assert not list(lp.adapters(again.teacher))


def test_a_folder_goes_to_the_one_network_that_has_its_modules(tmp_path):
    lp.export_peft(disturbed(lp.inject(MODELS["bert"](), lp.LoRA(rank=2))), tmp_path)
    both = lp.import_peft(pair(teacher="llama"), tmp_path)
    assert {name.partition(".")[0] for name, *_ in lp.adapters(both)} == {"student"}
    expected = lp.import_peft(MODELS["bert"](), tmp_path)
    torch.testing.assert_close(logits(read(both.student)), logits(read(expected)), atol=0, rtol=0)


def test_adapters_in_both_networks_stay_one_folder_of_the_module(tmp_path):
    torch.manual_seed(0)
    both = disturbed(lp.inject(pair(), lp.LoRA(rank=2)))
    lp.export_peft(both, tmp_path)
    back = lp.import_peft(pair(), tmp_path)
    for network in ("teacher", "student"):
        found, expected = (logits(read(model.get_submodule(network))) for model in (back, both))
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_prefixes_in_two_networks_are_no_folder(tmp_path):
    both = lp.inject(pair("llama", "llama"), lp.PrefixTuning(length=2, reparameterize=False, shift_positions=True))
    with pytest.raises(
        ValueError, match="PrefixTuning on Holder cannot be exchanged with HF PEFT: .* known tasks alone"
    ):
        lp.export_peft(both, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_prefixes_of_a_model_that_sees_are_no_folder(tmp_path):
    model = lp.inject(llava(), lp.PrefixTuning(length=2, reparameterize=False, shift_positions=True))
    with pytest.raises(ValueError, match="A prefix for LlavaForConditionalGeneration cannot be .* one stack of layers"):
        lp.export_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def speech():
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=99, num_mel_bins=8, max_source_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "task"),
    [(llava, "CAUSAL_LM"), (MODELS["t5"], "SEQ_2_SEQ_LM"), (speech, None)],
    ids=["sight", "t5", "speech"],
)
def test_the_task_is_what_peft_can_call(make, task, tmp_path):
    model = make()
    target = "q" if task == "SEQ_2_SEQ_LM" else "q_proj"
    lp.export_peft(disturbed(lp.inject(model, lp.LoRA(rank=2, targets=[target]))), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task


@needs_peft
def test_a_model_that_sees_computes_the_same_in_peft(tmp_path):
    import peft

    model = disturbed(lp.inject(llava(), lp.LoRA(rank=2)))
    lp.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llava(), tmp_path).eval()
    assert type(theirs) is peft.PeftModelForCausalLM
    torch.testing.assert_close(see(theirs), see(model), atol=1e-5, rtol=0)
    assert (see(model) - see(llava())).abs().max() > 1e-3
