"""On real models, where they are beside the checkout."""

import pytest
import torch
from installed import needs

import lightning_peft as lp

pytestmark = needs("transformers")


def test_adapters_of_a_really_trained_llama_change_little_by_little(shared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer("Once upon a time there was a little girl who had a red ball.", return_tensors="pt")
    x = batch["input_ids"]
    with torch.no_grad():
        before = model(x, labels=x).loss
    assert before < 3  # a random model of 512 tokens has 6.2
    lp.inject(model, lp.LLaMAAdapter())
    assert len(list(lp.adapters(model))) == 3
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = model(x, labels=x).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == before.item()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k"])
def test_text_of_a_prompt_starts_as_its_embeddings(shared, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)("a happy story", add_special_tokens=False)["input_ids"]
    lp.inject(model, lp.PromptTuning(length=2 * len(words), init="text", init_text="a happy story"))
    ((*_, adapter),) = lp.adapters(model)
    assert torch.equal(adapter.prompt, model.get_input_embeddings().weight[words + words])
