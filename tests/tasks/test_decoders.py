"""What CausalLM asks of models, what it logs, and how it generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer, seed_everything
from transformers import AutoConfig, AutoModelForCausalLM

import lightning_peft as lp
from lightning_peft.tasks import CausalLM, ChatDataModule
from lightning_peft.tasks.decoder_checks import check_causal
from lightning_peft.tasks.generation import generation_settings
from lightning_peft.tasks.pretrained import build_tokenizer
from lightning_peft.tasks.throughput import TokenCounter

Write = Callable[..., str]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
NEW = ["<|im_start|>", "<|im_end|>"]
PAIRS = [("name one", "red film good"), ("name two", "blue"), ("name a", "bad plot")]
CONFIG = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 18}
CONFIG |= {
    "intermediate_size": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16}


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {"enable_checkpointing": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0} | settings
    return Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **quiet, **settings)


@pytest.fixture
def chats(decoder_tokenizer: str, write: Write) -> ChatDataModule:
    """Three conversations in a format that needs two tokens more than the tokenizer has."""
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS]
    path = write("chats.jsonl", rows)
    files = {"train": path, "validation": path, "predict": path}
    template = {"chat_template": TEMPLATE, "new_tokens": NEW}
    return ChatDataModule(**files, **template, tokenizer=decoder_tokenizer, batch_size=3, max_length=32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "vocab_size": 32}, r"is an encoder \(bert\), whose tokens see those after them"),
        ({"model_type": "t5", "vocab_size": 32}, r"an encoder and a decoder \(t5\).* Take Seq2Seq with Seq2SeqData"),
    ],
)
def test_models_that_are_no_decoders_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLM(config=config)


def test_whether_a_model_sees_the_future_is_measured() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32}
    blind = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", is_decoder=True, **sizes))
    blind.train()
    check_causal(blind)
    assert all(module.training for module in blind.modules())
    seeing = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes))
    with pytest.raises(ValueError, match="BertLMHeadModel is no decoder as it is: what it predicts .* later tokens"):
        check_causal(seeing)
    with torch.device("meta"):
        check_causal(AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes)))


def test_tokens_without_embeddings_are_refused_by_name(tmp_path: Path, chats: ChatDataModule) -> None:
    message = (
        r"has 2 tokens that the model has no embeddings for: '<\|im_start\|>', '<\|im_end\|>' \(the model has 18\)"
    )
    with pytest.raises(
        ValueError, match=rf"{message}. Set resize_embeddings=true .* TrainableTokens\(tokens=\[18, 19\]"
    ):
        trainer(tmp_path, max_steps=1).fit(CausalLM(config=CONFIG), chats)


@pytest.mark.parametrize(
    ("tied", "method", "message"),
    [
        (
            True,
            lp.LoRA(),
            r"input embeddings 2 new rows, which nothing trains: .* TrainableTokens\(tokens=\[18, 19\]\)",
        ),
        (True, [lp.LoRA(), lp.TrainableTokens(tokens=[18])], "input embeddings 2 new rows, which nothing trains"),
        (False, [lp.LoRA(), lp.TrainableTokens(tokens=[18, 19])], "output layer 2 new rows.* output_head=true"),
    ],
)
def test_new_rows_that_nothing_trains_are_refused(
    tmp_path: Path, chats: ChatDataModule, tied: bool, method: Any, message: str
) -> None:
    module = CausalLM(config=CONFIG | {"tie_word_embeddings": tied}, resize_embeddings=True)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, lp.PEFTStrategy(method), max_steps=1).fit(module, chats)


@pytest.mark.slow
def test_a_chat_is_learned_with_new_tokens_resumed_loaded_and_answered(tmp_path: Path, chats: ChatDataModule) -> None:
    seed_everything(1, verbose=False)
    folder = str(tmp_path / "base")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).save_pretrained(folder)
    method = [lp.LoRA(rank=8, alpha=16, targets=["all-linear"]), lp.TrainableTokens(tokens=[18, 19])]
    module = CausalLM(folder, resize_embeddings=True, learning_rate=2e-2, max_new_tokens=6)
    strategy = lp.PEFTStrategy(method, show_summary=False)
    training = trainer(tmp_path, strategy, max_epochs=60, check_val_every_n_epoch=60)
    training.fit(module, chats)
    assert training.callback_metrics["val_loss"] < 0.1
    answers = [answer for _, answer in PAIRS]
    assert trainer(tmp_path).predict(module, chats) == [answers]
    asked = [[{"role": "user", "content": question}] for question, _ in PAIRS]
    assert [module.chat(messages) for messages in asked] == answers

    training.save_checkpoint(tmp_path / "chat.ckpt")
    lp.save_adapter(module, tmp_path / "adapter")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "chat.ckpt", weights_only=False)
    assert loaded.hparams["resize_embeddings"] == 20
    by_number = lp.load_adapter(CausalLM(folder, resize_embeddings=20), tmp_path / "adapter")
    tokenizer = str(tmp_path / "adapter")  # which travels with it
    by_tokenizer = lp.load_adapter(CausalLM(folder, tokenizer=tokenizer, resize_embeddings=True), tmp_path / "adapter")
    for fresh in (loaded, by_number, by_tokenizer):
        fresh.tokenizer = build_tokenizer(tokenizer)
        assert [fresh.chat(messages, max_new_tokens=6) for messages in asked] == answers


def test_positions_that_run_out_are_said_before_training(tmp_path: Path, decoder_tokenizer: str, write: Write) -> None:
    path = write("t.jsonl", [{"text": "good"}, {"text": "good " * 12}])
    settings = {"validation_fraction": 0, "tokenizer": decoder_tokenizer, "max_length": 64}
    data = ChatDataModule(path, **settings)
    prompts = lp.PEFTStrategy(lp.PromptTuning(length=5), show_summary=False)
    message = (
        r"longest row of the data has 14 tokens, and 5 virtual tokens come before it, but GPT2LMHeadModel has 16 pos"
    )
    with pytest.raises(ValueError, match=f"{message}.* Set max_length=11 or lower"):
        trainer(tmp_path, prompts, max_steps=1, limit_val_batches=0).fit(CausalLM(config=GPT2), data)
    prompts = lp.PEFTStrategy(lp.PromptTuning(length=2), show_summary=False)
    trainer(tmp_path, prompts, max_steps=1, limit_val_batches=0).fit(CausalLM(config=GPT2), data)
    long = ChatDataModule(write("l.jsonl", [{"text": "good " * 20}]), **settings)
    with pytest.raises(ValueError, match="has 22 tokens, but GPT2LMHeadModel has 16 positions"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(CausalLM(config=GPT2), long)


def test_tokens_a_second_are_those_without_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: LightningDataModule
) -> None:
    clock = iter(range(0, 10_000, 2))  # each look at the clock is two seconds later
    monkeypatch.setattr("lightning_peft.tasks.throughput.perf_counter", lambda: next(clock))
    counter = TokenCounter()
    counter.start()
    counter.add(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    counter.pause()
    assert counter.take() == 3 / 2
    counter.pause()
    counter.start()
    counter.add(torch.tensor([[1, 1]]))
    assert counter.take() == 2 / 4
    assert counter.take() is None
    monkeypatch.undo()
    logged = []
    module = CausalLM(config=CONFIG | {"vocab_size": 32})
    log = module.log
    monkeypatch.setattr(module, "log", lambda name, value, **k: (logged.append((name, k)), log(name, value, **k)))
    training = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    training.fit(module, facts)
    assert training.callback_metrics["tokens_per_second"] > 0
    settings = {"sync_dist": True, "reduce_fx": "sum"}
    assert [entry for entry in logged if entry[0] == "tokens_per_second"] == [("tokens_per_second", settings)] * 2


@pytest.fixture
def facts(decoder_tokenizer: str, write: Write) -> LightningDataModule:
    rows = [{"prompt": question, "completion": answer} for question, answer in PAIRS]
    template = "{% for m in messages %}{{ m.content }} {% if m.role != 'user' %}</s>{% endif %}{% endfor %}"
    settings = {"chat_template": template, "batch_size": 2, "validation_fraction": 0, "max_length": 32}
    return ChatDataModule(write("facts.jsonl", rows), tokenizer=decoder_tokenizer, **settings)


def test_generation_settings_of_a_model_are_kept(tmp_path: Path, decoder_tokenizer: str) -> None:
    module = CausalLM(config=CONFIG, tokenizer=decoder_tokenizer)
    network, tokenizer = module.network, build_tokenizer(decoder_tokenizer)
    assert generation_settings(network, tokenizer, False) == {
        "eos_token_id": [2],
        "pad_token_id": 2,
        "do_sample": False,
    }
    network.generation_config.update(eos_token_id=[5, 7], pad_token_id=3, do_sample=True, temperature=0.5)
    network.save_pretrained(tmp_path / "model")
    loaded = CausalLM(str(tmp_path / "model"), tokenizer=decoder_tokenizer).network
    tokenizer.add_tokens(NEW, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    assert generation_settings(loaded, tokenizer, True) == {"eos_token_id": [5, 7, 2, 19], "pad_token_id": 3}


def test_any_of_several_end_tokens_ends_a_text(tmp_path: Path, decoder_tokenizer: str) -> None:
    seed_everything(3, verbose=False)
    network: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    ids = torch.tensor([[1, 13, 14]])
    tokens = network.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 3:].tolist()
    last = tokens[2]
    network.generation_config.eos_token_id = [17, last]
    network.save_pretrained(tmp_path / "model")
    text = CausalLM(str(tmp_path / "model"), tokenizer=decoder_tokenizer).generate("name one", max_new_tokens=6)
    expected = tokens[: tokens.index(last) + 1]
    assert text == [build_tokenizer(decoder_tokenizer).decode(expected, skip_special_tokens=True)]
    assert len(expected) < 6


def test_chatting_needs_a_template(decoder_tokenizer: str) -> None:
    with pytest.raises(ValueError, match="has no chat template, which says how turns are written. Give CausalLM"):
        CausalLM(config=CONFIG, tokenizer=decoder_tokenizer).chat([{"role": "user", "content": "name"}])
