"""Tiny tokenizers, configs and tables: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "good",
    "bad",
    "fine",
    "awful",
    "film",
    "plot",
    "ending",
    "the",
    "a",
    "was",
    "name",
    "one",
    "two",
    "red",
    "blue",
]


def save_tokenizer(folder: Path, special: dict[str, str], template: processors.TemplateProcessing, *names: str) -> str:
    from transformers import PreTrainedTokenizerFast

    words = [*dict.fromkeys(special.values()), *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = template
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, model_input_names=["input_ids", *names], **special
    )
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then the words."""
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return save_tokenizer(tmp_path_factory.mktemp("encoder"), special, template, "token_type_ids", "attention_mask")


@pytest.fixture(scope="session")
def decoder_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """<unk> 0, <s> 1, </s> 2, then the words; no padding token, as with Llama."""
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return save_tokenizer(tmp_path_factory.mktemp("decoder"), special, template, "attention_mask")


@pytest.fixture
def bert() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {"model_type": "bert", "vocab_size": 32, "max_position_embeddings": 64, **sizes}


@pytest.fixture
def llama() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {"model_type": "llama", "vocab_size": 32, "max_position_embeddings": 64, "intermediate_size": 64, **sizes}


@pytest.fixture
def t5() -> dict[str, Any]:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return {"model_type": "t5", "vocab_size": 32, "feed_forward_proj": "gated-gelu", **sizes}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Sequence[dict[str, Any]]], str]:
    """Writes rows as JSONL and returns the file's path."""

    def write_rows(name: str, rows: Sequence[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_rows


@pytest.fixture
def reviews(write: Callable[[str, Sequence[dict[str, Any]]], str]) -> str:
    """32 rows that one word separates."""
    words = [("good", "pos"), ("bad", "neg"), ("fine", "pos"), ("awful", "neg")]
    nouns = ["film", "plot", "ending", "a film"]
    rows = [{"text": f"the {noun} was {word}", "label": label} for noun in nouns for word, label in words]
    return write("reviews.jsonl", rows * 2)


QUIET = [
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated",
    "ignore:The number of training batches",
    "ignore:`trainer.fit` stopped",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What Lightning says about small data on the CPU is no concern of these tests."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for text in QUIET:
                item.add_marker(pytest.mark.filterwarnings(text))
