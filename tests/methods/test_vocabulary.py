"""Tokens that a tokenizer and a model get, before adapters are injected."""

import pytest
import torch
from token_models import build, inputs, moved, tokenizer
from torch import nn

import lightning_peft as lp

NEW = ["<call>", "<result>"]


@pytest.mark.parametrize("name", ["llama", "tied", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "t5"))])
def test_new_rows_are_the_mean_and_ties_stay(name):
    base, model, words = build(name), build(name), tokenizer()
    before = torch.get_rng_state()
    assert lp.add_tokens(model, words, NEW) == [64, 65]
    assert torch.equal(torch.get_rng_state(), before)
    assert (len(words), words.convert_tokens_to_ids("<result>")) == (66, 65)
    old = base.get_input_embeddings().weight
    new = model.get_input_embeddings().weight
    assert torch.equal(new[:64], old)
    mean = old.double().mean(0).float()
    torch.testing.assert_close(new[64:], mean.expand(2, -1), atol=1e-7, rtol=1e-6)
    tied = base.get_output_embeddings().weight is old
    head = model.get_output_embeddings()
    assert (head.weight is new) == tied
    expected = base.get_output_embeddings().weight.double().mean(0).float()
    torch.testing.assert_close(head.weight[64:], expected.expand(2, -1), atol=1e-7, rtol=1e-6)
    assert model.config.vocab_size == 66


def test_the_mean_is_that_of_transformers_but_for_its_noise():
    ours, theirs = build("llama"), build("llama")
    lp.add_tokens(ours, tokenizer(), NEW)
    theirs.resize_token_embeddings(66)
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        a, b = (getattr(model, layer)().weight for model in (ours, theirs))
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_rows_are_padded_to_a_multiple_and_none_is_added_where_there_is_room():
    model, words = build("llama"), tokenizer(60)
    assert lp.add_tokens(model, words, NEW) == [60, 61]
    assert len(model.get_input_embeddings().weight) == 64
    assert torch.equal(model.get_input_embeddings().weight, build("llama").get_input_embeddings().weight)
    assert lp.add_tokens(model, words, ["<a>", "<b>", "<c>"], pad_to_multiple_of=16) == [62, 63, 64]
    assert len(model.get_input_embeddings().weight) == 80
    assert len(model.get_output_embeddings().weight) == 80


def test_known_tokens_keep_their_ids_and_a_second_call_changes_nothing():
    model, words = build("tied"), tokenizer()
    assert lp.add_tokens(model, words, ["w7", *NEW]) == [7, 64, 65]
    before = model.get_input_embeddings().weight.clone()
    assert lp.add_tokens(model, words, ["w7", *NEW]) == [7, 64, 65]
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_an_adapter_of_new_tokens_comes_to_a_fresh_machine(tmp_path):
    model, words = build("tied"), tokenizer()
    ids = lp.add_tokens(model, words, NEW, pad_to_multiple_of=8)
    lp.inject(model, [lp.LoRA(targets=["q_proj"]), lp.TrainableTokens(tokens=ids)])
    x = inputs("tied")
    x["input_ids"][:, 3] = ids[1]
    y = moved(model)(**x).logits
    lp.save_adapter(model, tmp_path / "a")
    words.save_pretrained(tmp_path / "a")

    fresh = build("tied")
    with pytest.raises(ValueError, match="Token 65 has no row in model.embed_tokens, which has 64.*add_tokens"):
        lp.load_adapter(fresh, tmp_path / "a")
    assert len(list(lp.adapters(fresh))) == 0
    from transformers import AutoTokenizer

    lp.add_tokens(fresh, AutoTokenizer.from_pretrained(tmp_path / "a"), NEW, pad_to_multiple_of=8)
    assert torch.equal(lp.load_adapter(fresh, tmp_path / "a")(**x).logits, y)


def test_a_model_inside_of_another_module_is_found():
    net = nn.ModuleDict({"net": build("llama")})
    assert lp.add_tokens(net, tokenizer(), NEW) == [64, 65]
    assert len(net["net"].get_input_embeddings().weight) == 66


def test_an_adapted_model_is_refused_and_the_tokenizer_left_alone():
    model, words = lp.inject(build("llama"), lp.LoRA(targets=["q_proj"])), tokenizer()
    with pytest.raises(RuntimeError, match="add tokens first, then inject"):
        lp.add_tokens(model, words, NEW)
    assert len(words) == 64


def test_a_model_of_no_library_is_refused():
    with pytest.raises(TypeError, match="Sequential holds 0 models of transformers"):
        lp.add_tokens(nn.Sequential(nn.Embedding(64, 4)), tokenizer(), NEW)
