from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_peft.tasks import ChoicesDataModule, MixedDataModule

Write = Callable[..., str]
TEMPLATES = {"asked": "{text} was the film", "named": "the ending {text}", "bare": "{text}"}
ANSWERS = {"neg": "bad", "pos": "good film"}
GOOD, BAD, FILM, THE, A, WAS, ENDING = 4, 5, 8, 11, 12, 13, 10  # in a tokenizer of [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3


def choices(*args: Any, **settings: Any) -> ChoicesDataModule:
    return ChoicesDataModule(*args, **{"max_length": 64, **settings})


@pytest.fixture
def texts(write: Write) -> str:
    rows = [{"text": "a plot", "label": "pos"}, {"text": "the", "label": "neg"}, {"text": "one", "label": "pos"}]
    return write("texts.jsonl", rows)


def test_rows_hold_each_wording_and_each_answer_once_tokenised(texts: str, encoder_tokenizer: str) -> None:
    data = choices(TEMPLATES, ANSWERS, train=texts, tokenizer=encoder_tokenizer, validation_fraction=0)
    answers = [[BAD, 3], [GOOD, FILM, 3]]
    row = data.examples("train")[1]
    prompts = [[2, THE, WAS, THE, FILM, 3], [2, THE, ENDING, THE, 3], [2, THE, 3]]
    assert row == {"input_ids": prompts, "choices": [answers] * 3, "labels": 0}
    assert data.labels == ["neg", "pos"]


def test_batches_are_padded_and_evaluation_has_one_wording(texts: str, encoder_tokenizer: str) -> None:
    files = {"validation": texts, "predict": texts, "train": texts, "tokenizer": encoder_tokenizer}
    data = choices(TEMPLATES, ANSWERS, {"named": {"pos": "fine", "neg": "awful"}}, **files)
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"][1].tolist() == [2, THE, WAS, THE, FILM, 3, 0]
    assert batch["attention_mask"][1].tolist() == [1] * 6 + [0]
    assert batch["choices"].tolist() == [[[BAD, 3, -100], [GOOD, FILM, 3]]] * 3
    assert batch["labels"].tolist() == [1, 0, 1]
    assert next(iter(data.val_dataloader()))["input_ids"].equal(batch["input_ids"])
    data = choices(TEMPLATES, ANSWERS, {"named": {"pos": "fine", "neg": "awful"}}, evaluate_with="named", **files)
    (batch,) = data.predict_dataloader()
    assert batch["choices"].tolist() == [[[7, 3], [6, 3]]] * 3  # in the order of answers
    assert "labels" not in batch


def test_answers_of_columns_differ_by_row_and_may_be_absent(encoder_tokenizer: str, write: Write) -> None:
    rows = [
        {"text": "one", "first": "good", "second": "bad plot", "third": "fine", "label": 2},
        {"text": "two", "first": "good", "second": "bad", "third": "", "label": 1},
    ]
    answers = {"0": "{first}", "1": "the {second}", "2": "{third}"}
    data = choices({"asked": "{text}"}, answers, test=write("t.jsonl", rows), tokenizer=encoder_tokenizer)
    (batch,) = data.test_dataloader()
    assert batch["choices"].tolist() == [
        [[GOOD, 3, -100, -100], [THE, BAD, 9, 3], [6, 3, -100, -100]],
        [[GOOD, 3, -100, -100], [THE, BAD, 3, -100], [-100] * 4],
    ]
    assert batch["labels"].tolist() == [2, 1]
    rows[1]["label"] = 2
    data = choices({"asked": "{text}"}, answers, test=write("w.jsonl", rows), tokenizer=encoder_tokenizer)
    with pytest.raises(ValueError, match=r"no text for the right choice in row 2"):
        data.setup("test")


def test_a_decoder_continues_the_prompt(texts: str, encoder_tokenizer: str, decoder_tokenizer: str) -> None:
    for tokenizer, start, end, shift in ((encoder_tokenizer, [2], 3, 0), (decoder_tokenizer, [1], 2, -1)):
        data = choices(
            {"bare": "{text} film"}, ANSWERS, test=texts, decoder_only=True, tokenizer=tokenizer
        )  # fmt: skip
        row = data.examples("test")[1]
        (prompt,), (answers,) = row["input_ids"], row["choices"]
        assert prompt == [*start, THE + shift, FILM + shift]
        assert answers == [[BAD + shift, end], [GOOD + shift, FILM + shift, end]]


def test_long_prompts_lose_the_end_of_one_field_alone(encoder_tokenizer: str, write: Write) -> None:
    path = write("t.jsonl", [{"text": "good film plot ending", "label": "pos"}])
    settings: dict[str, Any] = {"test": path, "tokenizer": encoder_tokenizer, "max_length": 6}
    data = choices({"asked": "the {text} was a"}, ANSWERS, shorten="text", **settings)
    assert data.examples("test")[0]["input_ids"][0] == [2, THE, GOOD, WAS, A, 3]
    with pytest.raises(ValueError, match=r"has 9 tokens, more than max_length=6; name the field to cut by shorten"):
        choices({"asked": "the {text} was a"}, ANSWERS, **settings).examples("test")


def drawn(data: Any) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in data.train_dataloader()]


def test_wordings_are_drawn_anew_at_each_visit_evenly_and_repeatably(encoder_tokenizer: str, write: Write) -> None:
    path = write("t.jsonl", [{"text": "good", "label": "pos"}] * 40)
    data = choices(TEMPLATES, ANSWERS, train=path, tokenizer=encoder_tokenizer, validation_fraction=0, batch_size=1)
    torch.manual_seed(3)
    epochs = [drawn(data) for _ in range(15)]
    assert len({str(epoch) for epoch in epochs}) == 15
    counts = Counter(len(batch[0]) for epoch in epochs for batch in epoch)
    assert set(counts) == {3, 5, 6}
    assert all(150 < count < 250 for count in counts.values())
    torch.manual_seed(3)
    assert [drawn(data) for _ in range(2)] == epochs[:2]


def test_workers_do_not_draw(texts: str, encoder_tokenizer: str) -> None:
    settings: dict[str, Any] = {"train": texts, "tokenizer": encoder_tokenizer, "validation_fraction": 0}
    data = choices(TEMPLATES, ANSWERS, **settings)
    assert data.train_dataloader().num_workers == 0
    mixed = MixedDataModule({"a": data, "b": choices(TEMPLATES, ANSWERS, **settings)}, num_workers=1)
    with pytest.raises(ValueError, match="worker processes do not share. Set num_workers=0"):
        drawn(mixed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": {}}, "Got no templates"),
        ({"templates": {"asked": "{text} [P:3]"}}, "has a mask or pseudo tokens, expected plain text"),
        ({"templates": {"asked": "{text} {mask}"}}, "has a mask or pseudo tokens"),
        ({"templates": {"asked": "{text"}}, "'{' at character 1 of the template .* not closed"),
        ({"templates": {"asked": " "}}, "empty text"),
        ({"answers": {"pos": "good"}}, "answers for 'pos', expected two labels or more"),
        ({"answers": {"pos": "good", "neg": ""}}, "empty text"),
        ({"evaluate_with": "askd"}, "'askd' is the name of no template. .* Did you mean 'asked'?"),
        ({"other_answers": {"nam": ANSWERS}}, "'nam' is the name of no template"),
        ({"other_answers": {"asked": {"pos": "fine"}}}, "other_answers of 'asked' are for the labels 'pos', expected"),
        ({"shorten": "body"}, "shorten='body' is no field of the template"),
    ],
)
def test_wordings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choices(**({"templates": TEMPLATES, "answers": ANSWERS} | change))


def test_tables_must_have_the_fields_and_known_labels(texts: str, encoder_tokenizer: str) -> None:
    def examples(**change: Any) -> Any:
        settings = {"templates": TEMPLATES, "answers": ANSWERS, "test": texts, "tokenizer": encoder_tokenizer} | change
        return choices(**settings).examples("test")

    with pytest.raises(ValueError, match="no column 'txt'. .* Did you mean 'text'?"):
        examples(templates={"asked": "{txt}"})
    with pytest.raises(ValueError, match="no column 'choice'"):
        examples(answers={"pos": "{choice}", "neg": "bad"})
    with pytest.raises(ValueError, match=r"label without an answer in rows 1, 3, such as 'pos'\. .* 'neg', 'good'"):
        examples(answers={"neg": "bad", "good": "good"})
