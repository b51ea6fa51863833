"""A model that cannot tell the token that ends its answers from others is told of before it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

import lightning_peft as lp
from lightning_peft.tasks import CausalLM, ChatDataModule, InstructionDataModule
from lightning_peft.tasks.token_rows_check import check_ends

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
CHAT = {"messages": [{"role": "user", "content": "name one"}, {"role": "assistant", "content": "red film"}]}
CONFIG = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
CONFIG |= {"intermediate_size": 32}
END = 2
LORA = lp.LoRA(targets=["q_proj"])
SAME = [END, 4, 9, 25]  # the last one is no token of the tokenizer


def model(tied: bool = True, same: bool = True) -> CausalLM:
    """A decoder in which some rows of the output layer differ by rounding alone."""
    module = CausalLM(config=CONFIG | {"tie_word_embeddings": tied})
    head = module.network.get_output_embeddings().weight
    with torch.no_grad():
        head[SAME if same else []] = head[END] * (1 + 2e-4 * torch.arange(len(SAME) if same else 0)[:, None])
    return module


@pytest.fixture
def chats(decoder_tokenizer: str, write: Callable[..., str]) -> ChatDataModule:
    settings: dict[str, Any] = {
        "chat_template": TEMPLATE,
        "tokenizer": decoder_tokenizer,
        "validation_fraction": 0,
        "max_length": 64,
    }
    return ChatDataModule(write("chats.jsonl", [CHAT] * 2), **settings)


def said(module: CausalLM, *data: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check_ends(module.network, data)
    return [str(warning.message) for warning in seen]


def test_a_fit_warns_once_that_answers_will_not_end(tmp_path: Path, chats: ChatDataModule) -> None:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    strategy = lp.PEFTStrategy(LORA, show_summary=False)
    with pytest.warns(UserWarning, match="Answers will not end") as seen:
        Trainer(max_steps=1, callbacks=[strategy], **quiet).fit(model(), chats)
    (text,) = [str(warning.message) for warning in seen if "Answers will not end" in str(warning.message)]
    assert "end token '</s>' (id 2) has the same row in the output layer as 3 other tokens" in text
    assert "tokens ('bad', 'ending', 25), to within 0.1%" in text
    assert "Add TrainableTokens(tokens=[2]) to the list peft.method" in text


@pytest.mark.parametrize(
    ("tied", "methods", "warns"),
    [
        (True, [LORA], True),
        (True, [LORA, lp.TrainableTokens(tokens=[END])], False),
        (True, [LORA, lp.TrainableTokens(tokens=[4])], True),
        (False, [LORA, lp.TrainableTokens(tokens=[END])], True),
        (False, [LORA, lp.TrainableTokens(tokens=[END], output_head=True)], False),
        (False, [lp.LoRA(targets=["lm_head"])], False),
        (False, [lp.FullFineTuning()], False),
    ],
)
def test_no_warning_where_the_rows_train(chats: ChatDataModule, tied: bool, methods: list[Any], warns: bool) -> None:
    chats.setup("fit")
    module = model(tied)
    lp.inject(module, methods)
    texts = said(module, chats)
    assert len(texts) == warns
    assert all(("output_head=true" in text) is not tied for text in texts)


@pytest.mark.parametrize("tied", [True, False])
def test_also_train_of_the_output_layer_is_enough(chats: ChatDataModule, tied: bool) -> None:
    chats.setup("fit")
    module = model(tied)
    lp.inject(module, LORA, also_train=["*embed_tokens" if tied else "*lm_head"])
    assert said(module, chats) == []


def test_a_random_model_has_no_equal_rows(chats: ChatDataModule) -> None:
    chats.setup("fit")
    module = model(same=False)
    lp.inject(module, LORA)
    assert said(module, chats) == []


def test_instructions_end_by_the_tokenizers_end_token(decoder_tokenizer: str, write: Callable[..., str]) -> None:
    path = write("rows.jsonl", [{"instruction": "name one", "output": "red"}])
    settings: dict[str, Any] = {"input": None, "prompt_style": "plain", "validation_fraction": 0, "max_length": 64}
    data = InstructionDataModule(path, tokenizer=decoder_tokenizer, **settings)
    data.setup("fit")
    module = model()
    lp.inject(module, LORA)
    assert "'</s>' (id 2)" in said(module, data)[0]


def test_an_end_token_without_labels_does_not_matter(chats: ChatDataModule, write: Callable[..., str]) -> None:
    chats.template = TEMPLATE.replace("</s>", "good")
    chats.tokenizer.add_special_tokens({"additional_special_tokens": ["good"]})
    chats.setup("fit")
    module = model()
    lp.inject(module, LORA)
    assert END not in chats.examples("train")[0]["labels"]
    assert said(module, chats) == []


@pytest.mark.slow
def test_stories260k_cannot_tell_its_end_token_from_168_others(shared: Path, write: Callable[..., str]) -> None:
    folder = str(shared / "models" / "stories260K")
    data = ChatDataModule(
        write("chats.jsonl", [CHAT]), chat_template=TEMPLATE, tokenizer=folder, validation_fraction=0, max_length=64
    )
    data.setup("fit")
    module = CausalLM(folder)
    lp.inject(module, LORA)
    assert "as 168 other tokens ('<unk>', " in said(module, data)[0]
