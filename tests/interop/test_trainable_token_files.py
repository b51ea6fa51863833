"""Rows of tokens in folders of HF PEFT: alone, and beside a LoRA; outputs are compared in both directions."""

import json

import pytest
import torch
from token_models import IDS, build, inputs, moved
from token_models import MAKE as MODELS

import lightning_peft as lp

peft = pytest.importorskip("peft")
NAMES = [name for name in MODELS if name != "bert"]
QUICK = ["llama", "tied"]
EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]


def methods(kind, **settings):
    tokens = lp.TrainableTokens(tokens=IDS, **settings)
    return [tokens] if kind == "alone" else [lp.LoRA(targets=["attention.query"], rank=2), tokens]


@torch.no_grad()
def logits(model, name):
    return model.eval()(**inputs(name)).logits


@pytest.mark.parametrize("kind", ["alone", "beside a lora"])
@pytest.mark.parametrize("name", EACH)
def test_peft_reads_what_is_exported_and_its_folder_comes_back(name, kind, tmp_path):
    model = moved(lp.inject(build(name), methods(kind)))
    y = logits(model, name)
    lp.export_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs, name), y, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(lp.import_peft(build(name), tmp_path / "ours"), name), y)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lp.import_peft(build(name), tmp_path / "theirs")
    torch.testing.assert_close(logits(back, name), y, atol=1e-5, rtol=1e-5)
    assert [p.shape for n, p in back.named_parameters() if "trainable_tokens" in n] == [
        (3, build(name).config.hidden_size)
    ]


@pytest.mark.parametrize("kind", ["alone", "beside a lora"])
def test_rows_of_an_untied_head_go_along(kind, tmp_path):
    model = moved(lp.inject(build("llama"), methods(kind, output_head=True)))
    lp.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(logits(theirs, "llama"), logits(model, "llama"), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(lp.import_peft(build("llama"), tmp_path), "llama"), logits(model, "llama"))


def test_ids_of_peft_may_be_in_any_order(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[40, 5, 11])
    theirs = moved(peft.get_peft_model(build("tied"), config))
    theirs.save_pretrained(tmp_path)
    model = lp.import_peft(build("tied"), tmp_path)
    torch.testing.assert_close(logits(model, "tied"), logits(theirs, "tied"), atol=1e-5, rtol=1e-5)
    rows = theirs.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    ours = {name: adapter for name, _, key, adapter in lp.adapters(model) if key == "trainable_tokens"}
    assert torch.equal(ours["model.embed_tokens"].weight, rows[[1, 2, 0]])


def test_layers_with_rows_of_different_tokens_become_two_methods(tmp_path):
    indices = {"embed_tokens": IDS, "lm_head": [2, 60]}
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=indices)
    theirs = moved(peft.get_peft_model(build("llama"), config))
    theirs.save_pretrained(tmp_path / "theirs")
    model = lp.import_peft(build("llama"), tmp_path / "theirs", name="tools")
    torch.testing.assert_close(logits(model, "llama"), logits(theirs, "llama"), atol=1e-5, rtol=1e-5)
    assert sorted({key for _, _, key, _ in lp.adapters(model)}) == ["tools", "tools_tokens", "tools_tokens_2"]
    lp.export_peft(model, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["trainable_token_indices"] == {"model.embed_tokens": IDS, "lm_head": [2, 60]}


def test_one_method_of_two_is_exported_by_name(tmp_path):
    model = moved(lp.inject(build("llama"), methods("beside a lora")))
    lp.export_peft(model, tmp_path / "tokens", name="trainable_tokens")
    assert json.loads((tmp_path / "tokens" / "adapter_config.json").read_text())["peft_type"] == "TRAINABLE_TOKENS"
    other = moved(lp.inject(build("llama"), [lp.IA3(), lp.TrainableTokens(tokens=IDS)]))
    with pytest.raises(ValueError, match=r"the model has ia3 \(IA3\), trainable_tokens \(TrainableTokens\)"):
        lp.export_peft(other, tmp_path / "other")


def test_a_tied_head_with_a_bias_is_refused_since_peft_leaves_it_out(tmp_path):
    model = moved(lp.inject(build("bert"), lp.TrainableTokens(tokens=IDS)))
    with pytest.raises(ValueError, match="it leaves out the bias"):
        lp.export_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_other_rows_for_layers_that_share_a_weight_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = peft.get_peft_model(build("tied"), peft.TrainableTokensConfig(token_indices=IDS))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    assert sorted(key.split(".")[-2] for key in state) == ["embed_tokens", "lm_head"]
    state["base_model.model.lm_head.trainable_tokens_delta"] += 1
    save_file(state, file)
    with pytest.raises(ValueError, match="share one weight here"):
        lp.import_peft(build("tied"), tmp_path)


def test_a_base_with_too_few_rows_is_told_what_to_do(tmp_path):
    grown = build("tied")
    grown.resize_token_embeddings(66)
    lp.export_peft(lp.inject(grown, lp.TrainableTokens(tokens=[64, 65])), tmp_path)
    model = build("tied")
    with pytest.raises(ValueError, match="Token 65 has no row .*resize_token_embeddings"):
        lp.import_peft(model, tmp_path)
    assert not list(lp.adapters(model))


def test_vllm_has_no_place_for_rows_of_tokens(tmp_path):
    lp.export_peft(lp.inject(build("llama"), methods("beside a lora")), tmp_path)
    (problem,) = lp.vllm_problems(tmp_path)
    assert "token_adapter.trainable_tokens_delta. Merge the adapter and serve the whole model" in problem
