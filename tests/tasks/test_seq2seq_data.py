from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.tasks import Seq2SeqDataModule

Write = Callable[..., str]
GOOD, BAD, FILM, PLOT, A, ONE = 4, 5, 8, 9, 12, 15  # in a tokenizer of [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3


@pytest.fixture
def pairs(write: Write) -> str:
    rows = [{"source": "film", "target": "good film a"}, {"source": "bad plot one", "target": "bad"}]
    return write("pairs.jsonl", rows)


def of(**settings: Any) -> Seq2SeqDataModule:
    return Seq2SeqDataModule(**{"max_source_length": 64, **settings})


def rows_of(data: Seq2SeqDataModule, split: Any) -> list[dict[str, Any]]:
    return list(data.examples(split))


def test_rows_hold_the_prefixed_source_and_the_target_as_the_tokenizer_writes_them(
    pairs: str, encoder_tokenizer: str
) -> None:
    data = of(train=pairs, test=pairs, prefix="the ", tokenizer=encoder_tokenizer, validation_fraction=0)
    first, second = rows_of(data, "train")
    assert first == {"input_ids": [2, 11, FILM, 3], "attention_mask": [1] * 4, "labels": [2, GOOD, FILM, A, 3]}
    assert second["input_ids"] == [2, 11, BAD, PLOT, ONE, 3]
    (batch,) = data.test_dataloader()
    assert batch["input_ids"].tolist() == [[2, 11, FILM, 3, 0, 0], [2, 11, BAD, PLOT, ONE, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["labels"].tolist() == [[2, GOOD, FILM, A, 3], [2, BAD, 3, -100, -100]]
    assert batch["references"] == ["good film a", "bad"]


def test_other_columns_can_be_named_and_rows_to_predict_need_no_target(encoder_tokenizer: str, write: Write) -> None:
    path = write("t.jsonl", [{"mr": "film", "text": "good"}])
    data = of(
        test=path, predict=path, source="mr", target="text", tokenizer=encoder_tokenizer
    )  # fmt: skip
    assert rows_of(data, "test")[0]["labels"] == [2, GOOD, 3]
    assert rows_of(data, "predict") == [{"input_ids": [2, FILM, 3], "attention_mask": [1] * 3}]
    wrong = of(test=path, source="mr", tokenizer=encoder_tokenizer)
    with pytest.raises(ValueError, match="no column 'target'"):
        wrong.examples("test")


def test_cut_rows_are_counted_and_targets_keep_their_end(encoder_tokenizer: str, write: Write) -> None:
    rows = [
        {"source": "film", "target": "good film a film"},
        {"source": "bad plot one film", "target": "bad"},
        {"source": "film", "target": "good"},
    ]
    data = of(test=write("t.jsonl", rows), max_source_length=5, max_target_length=4, tokenizer=encoder_tokenizer)
    with pytest.warns(UserWarning, match=r"2 of 3 rows of .* above max_source_length=5 tokens or targets above max_ta"):
        first, second, third = rows_of(data, "test")
    assert first["labels"] == [2, GOOD, FILM, 3]
    assert first["references"] == "good film a film"
    assert second["input_ids"] == [2, BAD, PLOT, ONE, 3]
    assert third["labels"] == [2, GOOD, 3]


def test_rows_can_be_padded_to_the_maximal_lengths(pairs: str, encoder_tokenizer: str) -> None:
    settings: dict[str, Any] = {"max_source_length": 9, "max_target_length": 7, "padding": "max_length"}
    (batch,) = of(test=pairs, tokenizer=encoder_tokenizer, **settings).test_dataloader()
    assert batch["input_ids"].shape == (2, 9)
    assert batch["labels"].tolist() == [[2, GOOD, FILM, A, 3, -100, -100], [2, BAD, 3] + [-100] * 4]


def test_train_batches_group_sources_by_length(encoder_tokenizer: str, write: Write) -> None:
    rows = [{"source": "film " * (1 + number % 8), "target": "good"} for number in range(64)]
    data = of(train=write("t.jsonl", rows), tokenizer=encoder_tokenizer, validation_fraction=0)
    torch.manual_seed(0)
    batches = list(data.train_dataloader())
    assert len(batches) == 8
    assert all((batch["attention_mask"] == 1).all() for batch in batches)


@pytest.mark.parametrize(("kind", "labels", "name"), [
    ("MBartTokenizer", lambda code: [4, 7, 2, code], "decoder_start_token_id"),
    ("MBart50Tokenizer", lambda code: [code, 5, 8, 2], "forced_bos_token_id"),
])  # fmt: skip
def test_languages_go_to_the_tokenizer_and_targets_begin_with_theirs(
    kind: str, labels: Any, name: str, tmp_path: Path, write: Write
) -> None:
    import transformers

    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -1.0) for word in ("good", "bad", "fine", "film")]
    getattr(transformers, kind)(vocab=[*special, *words]).save_pretrained(tmp_path)
    path = write("t.jsonl", [{"source": "bad film", "target": "good film"}])
    data = of(test=path, src_lang="de_DE", tgt_lang="ro_RO", tokenizer=str(tmp_path))
    german, romanian = data.tokenizer.convert_tokens_to_ids(["de_DE", "ro_RO"])
    row = rows_of(data, "test")[0]
    assert row["labels"] == labels(romanian)
    assert german in row["input_ids"]
    assert data.generation == {name: romanian}
    with pytest.raises(ValueError, match="tgt_lang='ro', but MBart.* has no such language. Correct its code"):
        of(test=path, tgt_lang="ro", tokenizer=str(tmp_path)).examples("test")


def test_languages_of_a_tokenizer_without_are_refused(pairs: str, encoder_tokenizer: str) -> None:
    data = of(test=pairs, src_lang="de", tokenizer=encoder_tokenizer)
    with pytest.raises(ValueError, match="src_lang='de', but .* has no such language. Set it to null; a prefix may"):
        data.examples("test")
    assert of(test=pairs, tokenizer=encoder_tokenizer).generation == {}


def test_targets_must_end(pairs: str, decoder_tokenizer: str) -> None:
    with pytest.raises(ValueError, match="writes targets without an end token, so a model could not learn"):
        of(test=pairs, tokenizer=decoder_tokenizer).examples("test")
    with pytest.raises(ValueError, match="max_target_length=1, expected 2 or more: a token and the end token"):
        of(test=pairs, max_target_length=1)
