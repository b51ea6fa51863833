"""BitFit: the biases that a model has, and zero biases for models that have none."""

import pytest
import torch
import transformers as t
from models import MODELS, logits, tokens
from torch import nn

import lightning_peft as lp

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def gemma():
    torch.manual_seed(0)
    return t.GemmaForCausalLM(t.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0)).eval()


WITHOUT = {"llama": MODELS["llama"], "t5": MODELS["t5"], "gemma": gemma}
LAYERS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gemma": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "t5": {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
}


def answer(name, model):
    call = {"decoder_input_ids": tokens(2, 4)} if name == "t5" else {}
    return logits(model(tokens(), **call))


def added(model):
    return {name: adapter for name, _, _, adapter in lp.adapters(model)}


def stirred(name, **settings):
    model = lp.inject(WITHOUT[name](), lp.BitFit(add_missing=True, **settings)).eval()
    generator = torch.Generator().manual_seed(5)
    for adapter in added(model).values():
        assert not adapter.bias.any()
        with torch.no_grad():
            adapter.bias.copy_(torch.randn(adapter.bias.shape, generator=generator))
    return model


def by_hand(name, model):
    """Return a base whose linear layers got these biases as torch has them."""
    base = WITHOUT[name]().eval()
    for layer, adapter in added(model).items():
        base.get_submodule(layer).bias = nn.Parameter(adapter.bias.detach().clone())
    return base


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_without_biases_is_refused_with_what_to_do(name):
    base = WITHOUT[name]()
    with pytest.raises(ValueError, match=rf"{type(base).__name__} has no biases to train; BitFit\(add_missing=True\)"):
        lp.inject(base, lp.BitFit())
    with pytest.raises(ValueError, match=r"What targets=\['\*norm\*'\] names has no biases to train"):
        lp.inject(MODELS["llama"](), lp.BitFit(targets=["*norm*"]))


@pytest.mark.parametrize("name", WITHOUT)
@torch.no_grad()
def test_added_biases_are_those_of_the_linear_layers_of_the_blocks(name):
    model, base = stirred(name), WITHOUT[name]().eval()
    assert {layer.rpartition(".")[2] for layer in added(model)} == LAYERS[name]
    linear = {n for n, m in base.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert set(added(model)) == linear
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"{n}.peft.bitfit.bias" for n in added(model)
    ]
    expected = answer(name, by_hand(name, model))
    torch.testing.assert_close(answer(name, model), expected, atol=1e-5, rtol=1e-5)
    assert (answer(name, base) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", WITHOUT)
@torch.no_grad()
def test_added_biases_are_saved_loaded_and_merged(name, tmp_path):
    model = stirred(name)
    expected, hand = answer(name, model), by_hand(name, model).state_dict()
    lp.save_adapter(model, tmp_path / "adapter")
    loaded = lp.load_adapter(WITHOUT[name](), tmp_path / "adapter").eval()
    assert torch.equal(answer(name, loaded), expected)
    merged = lp.merge(model).state_dict()
    assert merged.keys() == hand.keys()
    assert all(torch.equal(merged[key], value) for key, value in hand.items())
    torch.testing.assert_close(answer(name, model), expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_added_biases_are_those_of_biases():
    model = stirred("t5")
    hand = by_hand("t5", model)
    for network in (model, hand):
        answer("t5", network).square().sum().backward()
    for layer, adapter in added(model).items():
        torch.testing.assert_close(adapter.bias.grad, hand.get_submodule(layer).bias.grad, atol=1e-4, rtol=1e-4)


def test_targets_choose_which_layers_get_a_bias_and_those_that_have_one_keep_it():
    assert {n.rpartition(".")[2] for n in added(stirred("llama", targets=["q_proj", "v_proj"]))} == {"q_proj", "v_proj"}
    bert = lp.inject(MODELS["bert"](), lp.BitFit(add_missing=True))
    assert not added(bert)
    trained = {n for n, p in bert.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in bert.named_parameters() if n.endswith("bias")}


def test_biases_on_which_no_output_depends_are_left_out_unless_they_are_named():
    """BigBird's classifier reads the hidden states, and not what its backbone pools."""
    torch.manual_seed(0)
    config = t.BigBirdConfig(**SIZES, max_position_embeddings=48, attention_type="original_full", pad_token_id=0)
    model = t.BigBirdForSequenceClassification(config)
    with pytest.warns(UserWarning, match="BitFit leaves out 1 biases.*depends on them: bert.pooler.bias. Name them"):
        lp.inject(model, lp.BitFit())
    biases = {name for name, _ in model.named_parameters() if "bias" in name.rpartition(".")[2]}
    model(tokens(), labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == biases - {"bert.pooler.bias"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    lp.inject(lp.detach(model), lp.BitFit(targets=["*"]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == biases
