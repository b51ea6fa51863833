"""Prompt tuning: a longer row of embeddings, its start, and an installed peer."""

import pytest
import torch
from models import MODELS, logits, tokens
from single_layers import fill, needs_peft, only

import lightning_peft as lp


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompt_tuning_is_a_longer_row_of_embeddings(name):
    model = fill(lp.inject(MODELS[name](), lp.PromptTuning(length=3)))
    _, adapter = only(model)
    base, x = MODELS[name](), tokens()
    embedded = torch.cat([adapter.prompt.expand(2, -1, -1), base.get_input_embeddings()(x)], 1)
    torch.testing.assert_close(logits(model(x)), logits(base(inputs_embeds=embedded))[:, 3:])


def test_prompt_tuning_starts_as_asked():
    model, base = MODELS["llama"](), MODELS["llama"]()
    _, adapter = only(lp.inject(model, lp.PromptTuning(length=50)))
    assert adapter.prompt.min() >= -0.5
    assert adapter.prompt.max() <= 0.5
    assert adapter.prompt.std().item() == pytest.approx(12**-0.5, rel=0.05)
    _, adapter = only(lp.inject(MODELS["llama"](), lp.PromptTuning(length=50, init="vocabulary")))
    rows = base.get_input_embeddings().weight
    found = (adapter.prompt[:, None] == rows[None]).all(-1)
    assert found.any(1).all()
    assert len(found.float().argmax(1).unique()) == 50


@needs_peft
def test_prompt_tuning_equals_peft():
    import peft

    model = fill(lp.inject(MODELS["llama"](), lp.PromptTuning(length=3)))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(MODELS["llama"](), config).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(only(model)[1].prompt)
        difference = (model(tokens()).logits - theirs(tokens()).logits[:, 3:]).abs().max().item()
    print(f"prompt tuning: max difference {difference:.1e}")
    assert difference <= 2e-6
