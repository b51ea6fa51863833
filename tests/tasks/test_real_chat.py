"""A really trained model learns to chat, and the adapter answers the same in HF peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import needs
from lightning import Trainer, seed_everything

import lightning_peft as lp
from lightning_peft.tasks import CausalLM, ChatDataModule

pytestmark = [needs("peft"), pytest.mark.slow]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PETS = {"Tom": ("dog", "red"), "Lily": ("cat", "blue"), "Max": ("bird", "green"), "Sue": ("fish", "big")}


def chat(name: str) -> list[dict[str, str]]:
    pet, look = PETS[name]
    said = [f"What does {name} have?", f"{name} has a {pet}.", "How does it look?", f"The {pet} is {look}."]
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, said, strict=True)]


@pytest.fixture
def data(shared: Path, tmp_path: Path) -> ChatDataModule:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat(name)}) + "\n" for name in PETS))
    settings = {"chat_template": TEMPLATE, "new_tokens": ["<|im_start|>", "<|im_end|>"], "max_length": 256}
    return ChatDataModule(str(path), str(path), batch_size=2, **settings)


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k"])
def test_a_story_model_learns_two_turns_and_says_the_same_in_peft(
    shared: Path, tmp_path: Path, data: ChatDataModule, name: str
) -> None:
    seed_everything(1, verbose=False)
    folder = str(shared / "models" / name)
    module = CausalLM(folder, resize_embeddings=True, learning_rate=1e-2, max_new_tokens=24)
    rows = module.network.config.vocab_size
    method = [lp.LoRA(rank=8, alpha=16, targets=["all-linear"]), lp.TrainableTokens(tokens=[rows, rows + 1])]
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    strategy = lp.PEFTStrategy(method, show_summary=False)
    trainer = Trainer(max_epochs=40, check_val_every_n_epoch=40, callbacks=[strategy], **quiet)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val_loss"] < 0.1
    for pet in PETS:
        ask, answer, then, last = chat(pet)
        assert module.chat([ask]) == answer["content"]
        assert module.chat([ask, answer, then]) == last["content"]

    lp.export_peft(module, tmp_path / "peft")
    assert says(folder, rows, tmp_path / "peft", data.tokenizer) == [
        turn["content"] for pet in PETS for turn in chat(pet) if turn["role"] == "assistant"
    ]


def says(folder: str, rows: int, adapter: Path, tokenizer: Any) -> list[str]:
    """What the model with this adapter answers in HF peft, with transformers' own use of the template."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(rows + 2, mean_resizing=False)
    model = PeftModel.from_pretrained(base, adapter).eval()
    texts = []
    greedy = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": rows + 1, "pad_token_id": 0}
    for pet in PETS:
        for turns in (chat(pet)[:1], chat(pet)[:3]):
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                ids = model.generate(**inputs, **greedy)
            texts.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts
