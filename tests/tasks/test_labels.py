"""Labels as scores or as several classes a row: what is read, what is refused, and what a batch holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.tasks import MixedDataModule, TextDataModule

Write = Callable[..., str]
SEVERAL = "multi_label_classification"


def batch_of(path: str, tokenizer: str, **settings: Any) -> tuple[TextDataModule, torch.Tensor]:
    data = TextDataModule(path, path, tokenizer=tokenizer, **settings)
    data.setup("fit")
    return data, next(iter(data.val_dataloader()))["labels"]


def test_scores_of_a_csv_are_those_of_a_jsonl(encoder_tokenizer: str, write: Write, tmp_path: Path) -> None:
    scores = [0, 0.5, -1.25, 1e3]
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"good,{score}\n" for score in scores))
    paths = [str(tmp_path / "t.csv"), write("t.jsonl", [{"text": "good", "label": score} for score in scores])]
    for path in paths:
        data, labels = batch_of(path, encoder_tokenizer, problem_type="regression")
        assert data.classes is None
        assert labels.dtype == torch.float32
        assert labels.tolist() == scores


def test_what_is_no_number_is_no_score(encoder_tokenizer: str, write: Write) -> None:
    labels = [0.5, "1,5", True, None, "nan", "", [1.0], "2"]
    path = write("t.jsonl", [{"text": "good", "label": label} for label in labels])
    with pytest.raises(ValueError, match=r"no finite number in rows 2, 3, 4, 5, 6 and 1 more. Regression needs one"):
        batch_of(path, encoder_tokenizer, problem_type="regression")


@pytest.mark.parametrize("labels", [["0.0", "0.5", "1.0"], ["1", "2", "2.5"], ["1e-1", "2"]])
def test_decimal_numbers_are_no_classes(encoder_tokenizer: str, tmp_path: Path, labels: list[str]) -> None:
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"good,{label}\n" for label in labels))
    with pytest.raises(ValueError, match="decimal numbers.* set problem_type: regression in the data and num_"):
        batch_of(str(tmp_path / "t.csv"), encoder_tokenizer)


def test_names_that_hold_numbers_are_classes(encoder_tokenizer: str, write: Write) -> None:
    labels = ["1.0.2", "nan", "2.5", "inf"]
    data, _ = batch_of(write("t.jsonl", [{"text": "a", "label": label} for label in labels]), encoder_tokenizer)
    assert data.classes == ["1.0.2", "2.5", "inf", "nan"]


@pytest.mark.parametrize(
    ("label", "hint"),
    [(0.5, "set problem_type: regression in the data"), (["a"], "set problem_type: multi_label_classification")],
)
def test_a_refused_label_names_the_problem_that_it_fits(
    encoder_tokenizer: str, write: Write, label: Any, hint: str
) -> None:
    path = write("t.jsonl", [{"text": "good", "label": "a"}, {"text": "good", "label": label}])
    with pytest.raises(ValueError, match=f"no string or whole number in rows? .*2.*{hint}"):
        batch_of(path, encoder_tokenizer)


def test_rows_have_any_number_of_labels(encoder_tokenizer: str, write: Write, tmp_path: Path) -> None:
    rows = [["joy", "anger"], [], ["fear"], ["joy", "joy"]]
    (tmp_path / "t.csv").write_text('text,label\na,"joy, anger"\na,\na,fear\na,"joy,joy"\n')
    jsonl = write("t.jsonl", [{"text": "a", "label": row} for row in rows])
    for path, separator in ((jsonl, None), (str(tmp_path / "t.csv"), ",")):
        data, labels = batch_of(path, encoder_tokenizer, problem_type=SEVERAL, label_separator=separator)
        assert data.classes == ["anger", "fear", "joy"]
        assert labels.dtype == torch.float32
        assert labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_whole_numbers_are_labels_in_their_order(encoder_tokenizer: str, write: Write) -> None:
    path = write("t.jsonl", [{"text": "a", "label": row} for row in ([10, 9], [2], None)])
    data, labels = batch_of(path, encoder_tokenizer, problem_type=SEVERAL)
    assert data.classes == [2, 9, 10]
    assert labels.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_texts_need_a_separator(encoder_tokenizer: str, write: Write, tmp_path: Path) -> None:
    path = write("t.jsonl", [{"text": "a", "label": row} for row in (["x"], "x,y", [0.5], [""], "")])
    with pytest.raises(ValueError, match="no list of labels in rows 2, 3, 4.* set label_separator"):
        batch_of(path, encoder_tokenizer, problem_type=SEVERAL)
    (tmp_path / "p.csv").write_text("text,label\na,\"['x', 'y']\"\n")  # what pandas writes
    with pytest.raises(ValueError, match="no list of labels in row 2"):
        batch_of(str(tmp_path / "p.csv"), encoder_tokenizer, problem_type=SEVERAL, label_separator=",")
    (tmp_path / "s.csv").write_text("text,label\na,x;y\na,z\n")
    with pytest.warns(UserWarning, match="No row of .* has more than one label.*'x;y', 'z'.*; it is ','"):
        batch_of(str(tmp_path / "s.csv"), encoder_tokenizer, problem_type=SEVERAL, label_separator=",")
    with pytest.raises(ValueError, match="label_separator=',' and problem_type='single_label_classification'"):
        TextDataModule(path, label_separator=",")
    with pytest.raises(ValueError, match="problem_type='scores', expected one of single_label_classification"):
        TextDataModule(path, problem_type="scores")  # type: ignore[arg-type]


def test_several_labels_must_be_known_and_differ(encoder_tokenizer: str, write: Write) -> None:
    train = write("t.jsonl", [{"text": "a", "label": row} for row in (["x"], ["y"])])
    other = write("v.jsonl", [{"text": "a", "label": row} for row in ([], ["x", "z"])])
    data = TextDataModule(train, other, problem_type=SEVERAL, tokenizer=encoder_tokenizer)
    with pytest.raises(ValueError, match="Row 2 of .*v.jsonl' has the label 'z'.* Known labels: 'x', 'y'"):
        data.setup("fit")
    one = write("one.jsonl", [{"text": "a", "label": ["x"]}, {"text": "a", "label": []}])
    with pytest.raises(ValueError, match="has the labels 'x', expected two or more"):
        batch_of(one, encoder_tokenizer, problem_type=SEVERAL)


def test_numbers_of_a_declared_set_become_its_names(encoder_tokenizer: str, tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["world", "sport"])
    columns = {"text": ["a", "a"], "label": [1, 0], "all": [[1, 0], [0]]}
    several = datasets.Sequence(names)
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "all": several})
    path = str(tmp_path / "t.parquet")
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    data, labels = batch_of(path, encoder_tokenizer)
    assert data.classes == ["sport", "world"]
    assert labels.tolist() == [0, 1]
    data, labels = batch_of(path, encoder_tokenizer, label="all", problem_type=SEVERAL)
    assert data.classes == ["sport", "world"]
    assert labels.tolist() == [[1, 1], [0, 1]]


def test_classes_are_known_where_earlier_runs_encoded_all_rows(encoder_tokenizer: str, reviews: str) -> None:
    for _ in range(4):  # as often as keys of encoded rows change with what is known
        data = TextDataModule(reviews, tokenizer=encoder_tokenizer)
        data.setup("fit")
        assert data.classes == ["neg", "pos"]
        assert data.state_dict() == {"classes": ["neg", "pos"]}


def test_mixed_tasks_share_scores_and_sets_of_labels(encoder_tokenizer: str, write: Write) -> None:
    scores = write("s.jsonl", [{"text": "a", "label": 0.5}] * 4)
    sets = write("m.jsonl", [{"text": "a", "label": ["x", "y"]}, {"text": "a", "label": []}] * 2)
    for path, kind, expected in ((scores, "regression", [0.5] * 8), (sets, SEVERAL, [[1, 1], [0, 0]] * 4)):
        parts = {name: TextDataModule(path, path, problem_type=kind, tokenizer=encoder_tokenizer) for name in "ab"}
        data = MixedDataModule(parts)
        data.setup("fit")
        (batch,) = data.val_dataloader()
        assert batch["labels"].tolist() == expected
        assert batch["task_ids"].tolist() == [0] * 4 + [1] * 4
