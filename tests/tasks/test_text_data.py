from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_peft.tasks import TextDataModule
from lightning_peft.tasks.data.encoding.collator import Collator
from lightning_peft.tasks.pretrained import build_tokenizer

Write = Callable[..., str]


def test_batches_hold_tokens_masks_and_label_indices_padded_to_the_longest(
    encoder_tokenizer: str, write: Write
) -> None:
    rows = [{"text": "good", "label": "pos"}, {"text": "the film was bad", "label": "neg"}]
    data = TextDataModule(write("t.jsonl", rows), validation=write("v.jsonl", rows), tokenizer=encoder_tokenizer)
    data.setup("fit")
    assert data.classes == ["neg", "pos"]
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].tolist() == [[2, 4, 3, 0, 0, 0], [2, 11, 8, 13, 5, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]


def test_all_rows_can_have_one_length(encoder_tokenizer: str, write: Write) -> None:
    rows = [{"text": "good", "label": "pos"}, {"text": "the film was bad", "label": "neg"}]
    files = {"train": write("t.jsonl", rows), "validation": write("v.jsonl", rows)}
    data = TextDataModule(**files, tokenizer=encoder_tokenizer, batch_size=1, max_length=7, padding="max_length")
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert [batch["input_ids"].tolist() for batch in batches] == [[[2, 4, 3, 0, 0, 0, 0]], [[2, 11, 8, 13, 5, 3, 0]]]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="Got padding='shortest', expected one of longest, max_length"):
        TextDataModule(**files, padding="shortest")


def test_two_columns_are_a_pair(encoder_tokenizer: str, write: Write) -> None:
    rows = [{"first": "good", "second": "bad film", "same": label} for label in (0, 1)]
    files = {"train": write("t.jsonl", rows), "test": write("e.jsonl", rows)}
    data = TextDataModule(**files, text=["first", "second"], label="same", tokenizer=encoder_tokenizer)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"][0].tolist() == [2, 4, 3, 5, 8, 3]
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="expected one column or a list of two"):
        TextDataModule(**files, text=["a", "b", "c"], tokenizer=encoder_tokenizer)


def test_long_texts_are_cut(encoder_tokenizer: str, reviews: str) -> None:
    data = TextDataModule(reviews, tokenizer=encoder_tokenizer, max_length=4)
    data.setup("fit")
    assert {len(row["input_ids"]) for row in data.examples("train")} == {4}
    with pytest.raises(ValueError, match="max_length=129, but the model of .* takes at most 128 tokens. Lower"):
        TextDataModule(reviews, tokenizer=encoder_tokenizer, max_length=129).setup("fit")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "B"], ["B", "a", "b"]),
        ([10, 9, -1], [-1, 9, 10]),
        (["10", "9"], [9, 10]),
        (["01", "1"], ["01", "1"]),
        ([1, "a"], ["1", "a"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_classes_are_the_sorted_labels_of_the_train_file(
    encoder_tokenizer: str, write: Write, labels: list[Any], classes: list[Any]
) -> None:
    path = write("t.jsonl", [{"text": "good", "label": label} for label in labels])
    data = TextDataModule(path, tokenizer=encoder_tokenizer, validation_fraction=0)
    data.setup("fit")
    assert data.classes == classes
    assert [classes[row["labels"]] for row in data.examples("train")] == [type(classes[0])(label) for label in labels]
    assert data.val_dataloader() == []


def test_numbers_in_a_csv_mean_those_in_a_jsonl_and_gz_equals_plain(
    encoder_tokenizer: str, write: Write, tmp_path: Path
) -> None:
    train = write("t.jsonl", [{"text": f"good {label}", "label": label} for label in (3, 1)])
    (tmp_path / "v.csv").write_text("text,label\nbad,1\nfine,3\n")
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress((tmp_path / "v.csv").read_bytes()))
    files = {"validation": str(tmp_path / "v.csv"), "test": str(tmp_path / "e.csv.gz")}
    data = TextDataModule(train, **files, tokenizer=encoder_tokenizer)
    data.setup("fit")
    data.setup("test")
    assert [row["labels"] for row in data.examples("validation")] == [0, 1]
    assert data.examples("test")[:] == data.examples("validation")[:]


def test_limits_keep_the_first_rows_and_all_classes(encoder_tokenizer: str, write: Write) -> None:
    rows = [{"text": word, "label": word} for word in ("good", "bad", "fine")]
    files = {"train": write("t.jsonl", rows), "validation": write("v.jsonl", rows)}
    data = TextDataModule(**files, tokenizer=encoder_tokenizer, limit_train=1, limit_validation=2)
    data.setup("fit")
    assert data.classes == ["bad", "fine", "good"]
    assert [row["labels"] for row in data.examples("train")] == [2]
    assert [row["labels"] for row in data.examples("validation")] == [2, 0]


def test_without_a_validation_file_a_fixed_share_of_the_train_file_is_held_out(
    encoder_tokenizer: str, write: Write
) -> None:
    path = write("t.jsonl", [{"text": "good", "label": number} for number in range(20)])

    def labels(split: str, **limits: int) -> list[int]:
        data = TextDataModule(path, tokenizer=encoder_tokenizer, validation_fraction=0.2, **limits)
        data.setup("fit")
        return [row["labels"] for row in data.examples(split)]

    held_out = labels("validation")
    assert len(held_out) == 4
    assert sorted(held_out + labels("train")) == list(range(20))
    assert labels("validation", limit_train=5) == held_out
    assert labels("train", limit_train=5) == labels("train")[:5]
    one = write("one.jsonl", [{"text": "good", "label": 0}])
    with pytest.raises(ValueError, match="has 1 rows, too few to hold out .* set validation_fraction=0"):
        TextDataModule(one, tokenizer=encoder_tokenizer).setup("fit")


def test_labels_must_be_known_and_whole(encoder_tokenizer: str, reviews: str, write: Write) -> None:
    other = write("v.jsonl", [{"text": "good", "label": "pos"}, {"text": "bad", "label": "negative"}])
    with pytest.raises(ValueError, match="Row 2 of .*v.jsonl' has the label 'negative'.* Known labels: 'neg', 'pos'"):
        TextDataModule(reviews, validation=other, tokenizer=encoder_tokenizer).setup("fit")
    broken = write("b.jsonl", [{"text": "good", "label": label} for label in ("a", 0.5, None, "", [])])
    with pytest.raises(ValueError, match="Column 'label' of .* no string or whole number in rows 2, 3, 4, 5"):
        TextDataModule(broken, tokenizer=encoder_tokenizer).setup("fit")


def test_predicting_needs_no_labels_and_takes_the_classes_of_a_checkpoint(
    encoder_tokenizer: str, reviews: str, write: Write
) -> None:
    trained = TextDataModule(reviews, tokenizer=encoder_tokenizer)
    trained.setup("fit")
    data = TextDataModule(predict=write("p.jsonl", [{"text": "good"}]), test=reviews, tokenizer=encoder_tokenizer)
    data.setup("predict")
    assert "labels" not in next(iter(data.predict_dataloader()))
    data.setup("test")  # the labels' meaning is still to come
    data.load_state_dict(trained.state_dict())
    assert data.classes == ["neg", "pos"]
    assert next(iter(data.test_dataloader()))["labels"].tolist()[:4] == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="checkpoint has the classes 'a', 'b', but 'neg', 'pos' are in use already"):
        data.load_state_dict({"classes": ["a", "b"]})


def test_settings_and_files_that_are_missing_are_named(encoder_tokenizer: str, reviews: str) -> None:
    with pytest.raises(ValueError, match="neither model nor tokenizer"):
        _ = TextDataModule(reviews).tokenizer
    with pytest.raises(ValueError, match="batch_size=0, expected 1 or more"):
        TextDataModule(reviews, tokenizer=encoder_tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="limit_train=0, expected 1 or more"):
        TextDataModule(reviews, tokenizer=encoder_tokenizer, limit_train=0)
    with pytest.raises(ValueError, match="validation_fraction=1, expected 0"):
        TextDataModule(reviews, tokenizer=encoder_tokenizer, validation_fraction=1)
    data = TextDataModule(tokenizer=encoder_tokenizer)
    with pytest.raises(ValueError, match="Got train=None, expected a file. Set train to"):
        data.setup("fit")
    with pytest.raises(ValueError, match="Got test=None, expected a file. Set test to"):
        data.test_dataloader()
    with pytest.raises(ValueError, match="Got predict=None, expected a file. Set predict to"):
        data.setup("predict")
    with pytest.raises(ValueError, match="Got validation=None, expected a file"):
        TextDataModule(reviews, tokenizer=encoder_tokenizer, validation_fraction=0).setup("validate")


def test_labels_per_token_are_padded_on_the_tokenizers_side(encoder_tokenizer: str) -> None:
    rows = [{"input_ids": [5], "attention_mask": [1], "labels": [5]}]
    rows.append({"input_ids": [6, 7], "attention_mask": [1, 1], "labels": [-100, 7]})
    for side, ids, labels in (("right", [5, 0], [5, -100]), ("left", [0, 5], [-100, 5])):
        batch = Collator(build_tokenizer(encoder_tokenizer, side))(rows)
        assert batch["input_ids"][0].tolist() == ids
        assert torch.equal(batch["labels"], torch.tensor([labels, [-100, 7]]))


def test_worker_processes_get_no_trainer(encoder_tokenizer: str, reviews: str) -> None:
    data = TextDataModule(reviews, tokenizer=encoder_tokenizer)
    data.setup("fit")
    data.trainer = SimpleNamespace(lock=Lock())  # type: ignore[assignment]  # which no process can hand to another
    rows = data.examples("train")[:2]
    sent = pickle.loads(pickle.dumps(data.collate))(rows)
    assert all(torch.equal(value, sent[name]) for name, value in data.collate(rows).items())
