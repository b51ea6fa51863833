from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything

from lightning_peft.tasks import Choices, ChoicesDataModule

Write = Callable[..., str]
GOOD, BAD, FINE, FILM, PLOT = 4, 5, 6, 8, 9  # in a tokenizer of [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3
TEMPLATES = {"asked": "{text} was", "bare": "{text}"}


@pytest.fixture
def listed(encoder_tokenizer: str, write: Write) -> Callable[..., ChoicesDataModule]:
    def build(rows: list[dict[str, Any]], **settings: Any) -> ChoicesDataModule:
        path = write("rows.jsonl", rows)
        files = {"train": path, "test": path, "predict": path, "tokenizer": encoder_tokenizer, "max_length": 64}
        return ChoicesDataModule(TEMPLATES, choices="choices", validation_fraction=0, **{**files, **settings})

    return build


def test_rows_have_lists_of_any_number_and_labels_by_number_or_text(listed: Any) -> None:
    rows = [
        {"text": "film", "choices": ["good film", "bad", "fine"], "label": 2},
        {"text": "plot", "choices": ["bad", " good "], "label": 1},
    ]
    data = listed(rows)
    (batch,) = data.test_dataloader()
    absent = [-100] * 3
    assert batch["choices"].tolist() == [
        [[GOOD, FILM, 3], [BAD, 3, -100], [FINE, 3, -100]],
        [[BAD, 3, -100], [GOOD, 3, -100], absent],
    ]
    assert batch["labels"].tolist() == [2, 1]
    assert "texts" not in batch
    assert len(data.examples("train")[0]["input_ids"]) == 2
    (batch,) = data.predict_dataloader()
    assert batch["texts"] == [["good film", "bad", "fine"], ["bad", " good "]]
    assert "labels" not in batch
    for label in ("2", "fine"):
        assert listed([{**rows[0], "label": label}]).examples("test")[0]["labels"] == 2


def test_choices_may_have_names(listed: Any) -> None:
    named = {"text": ["good", "bad"], "label": ["1", "2"]}
    data = listed(
        [{"text": "film", "choices": named, "label": "2"}, {"text": "plot", "choices": named, "label": "good"}]
    )
    assert [row["labels"] for row in data.examples("test")] == [1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": [], "label": 0}, "holds fewer than two choices, or one without text, in row 2"),
        ({"choices": ["good"], "label": 0}, "holds fewer than two choices"),
        ({"choices": ["good", " "], "label": 0}, "or one without text, in row 2"),
        (
            {"choices": ["good", "bad"], "label": 2},
            "none of the choices in row 2, such as 2 for the choices 'good', 'bad'",
        ),
        ({"choices": ["good", "bad"], "label": -1}, "none of the choices in row 2"),
        ({"choices": ["good", "bad"], "label": "fine"}, "none of the choices in row 2"),
    ],
)
def test_rows_that_cannot_be_are_named(row: dict[str, Any], message: str, listed: Any) -> None:
    rows = [{"text": "film", "choices": ["good", "bad"], "label": type(row["label"])(0)}, {"text": "plot", **row}]
    rows[0]["label"] = 0 if isinstance(row["label"], int) else "good"
    with pytest.raises(ValueError, match=message):
        listed(rows).examples("test")


def test_labels_that_may_mean_several_choices_are_refused(listed: Any) -> None:
    with pytest.raises(
        ValueError, match="may mean several of the choices in row 1, such as '1' for the choices '1', '2'"
    ):
        listed([{"text": "film", "choices": ["1", "2"], "label": "1"}]).examples("test")
    with pytest.raises(ValueError, match="may mean several of the choices in row 1"):
        listed([{"text": "film", "choices": ["good", "good"], "label": "good"}]).examples("test")
    assert listed([{"text": "film", "choices": ["1", "2"], "label": 1}]).examples("test")[0]["labels"] == 1
    with pytest.raises(ValueError, match="holds no list of texts in row 1"):
        listed([{"text": "film", "choices": "good", "label": 1}]).examples("test")


def test_answers_and_choices_are_one_or_the_other() -> None:
    with pytest.raises(ValueError, match="Got answers=None and choices=None, expected one of them"):
        ChoicesDataModule(TEMPLATES)
    with pytest.raises(ValueError, match="expected one of them"):
        ChoicesDataModule(TEMPLATES, {"0": "bad", "1": "good"}, choices="choices")
    with pytest.raises(
        ValueError, match="other_answers for 'bare' and choices, whose texts are in each row. Remove one"
    ):
        ChoicesDataModule(TEMPLATES, None, {"bare": {"0": "bad", "1": "good"}}, choices="choices")
    with pytest.raises(ValueError, match="'askd' is the name of no template"):
        ChoicesDataModule(TEMPLATES, choices="choices", evaluate_with="askd")


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_predictions_are_the_texts_of_the_rows(listed: Any, t5: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"text": "film", "choices": ["good", "bad", "fine"], "label": 1},
        {"text": "plot", "choices": ["bad plot", "good film"], "label": "bad plot"},
    ]
    seed_everything(0, verbose=False)
    module, data = Choices(config=t5), listed(rows, batch_size=2)
    quiet: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "limit_val_batches": 0,
    }
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, max_epochs=15, **quiet)
    module.hparams["learning_rate"] = 0.05
    trainer.fit(module, data)
    assert trainer.test(module, data, verbose=False)[0]["test_accuracy"] == 1
    (found,) = trainer.predict(module, data)
    assert found["labels"] == ["bad", "bad plot"]
    assert found["probabilities"][1, 2] == 0
    assert torch.allclose(found["probabilities"].sum(1), torch.ones(2))
