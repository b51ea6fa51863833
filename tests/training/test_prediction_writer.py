"""``PredictionWriter``: what ``Trainer.predict`` finds, row by row, in a file that other programs read."""

import csv
import json
import math

import lightning.pytorch as pl
import pytest
import torch
from processes import together
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from trainer_models import trainer

import lightning_peft as lp
from lightning_peft.files.ordered_lines import LinesWriter, ordered_lines
from lightning_peft.training.prediction_rows import flat_row, prediction_rows

ROWS = torch.arange(10.0)[:, None]


class Task(pl.LightningModule):
    """Returns for each batch what a function makes of it."""

    def __init__(self, answer, names=None):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.answer, self.class_names = answer, names

    def predict_step(self, batch, index, dataloader_idx=0):
        return self.answer(batch)


def classes(batch):
    """Even rows are of class 0."""
    probabilities = torch.nn.functional.one_hot(batch[:, 0].long() % 2, 2).float() * 0.8 + 0.1
    return {
        "labels": ["even" if row % 2 == 0 else "odd" for row in batch[:, 0].tolist()],
        "probabilities": probabilities,
    }


def predict(answer, path, names=None, loader=None, **settings):
    loader = DataLoader(ROWS, batch_size=4) if loader is None else loader
    tuner = trainer(lp.PredictionWriter(path), **settings)
    tuner.predict(Task(answer, names), loader, return_predictions=False)
    return tuner


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_has_its_number_its_label_and_probabilities_by_class_name(tmp_path, capsys):
    predict(classes, tmp_path / "out.jsonl", names=["even", "odd"])
    found = lines(tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == list(range(1, 11))
    assert found[1] == {"row": 2, "label": "odd", "probabilities": {"even": 0.1, "odd": 0.9}}
    assert [row["label"] for row in found] == ["even", "odd"] * 5
    assert f"predictions: {tmp_path / 'out.jsonl'} (10 rows)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_table_has_a_column_for_each_class(tmp_path):
    predict(classes, tmp_path / "out.csv", names=["even", "odd"])
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["row", "label", "probability_even", "probability_odd"]
    assert found[1] == {"row": "2", "label": "odd", "probability_even": "0.1", "probability_odd": "0.9"}
    assert len(found) == 10


def test_texts_and_tensors_have_columns_of_their_own(tmp_path):
    text = 'a "quoted", ünïcode\nline'
    predict(lambda batch: [text] * len(batch), tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file))[9] == {"row": "10", "text": text}
    predict(lambda batch: [text] * len(batch), tmp_path / "text.jsonl")
    assert lines(tmp_path / "text.jsonl")[9] == {"row": 10, "text": text}
    predict(lambda batch: batch[:, 0] / 3, tmp_path / "tensor.jsonl")
    assert lines(tmp_path / "tensor.jsonl")[1] == {"row": 2, "prediction": 0.3333333}


def test_without_a_path_the_file_lies_beside_the_logs(tmp_path):
    predict(classes, None, default_root_dir=tmp_path)
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["predictions.jsonl"]
    assert lines(tmp_path / "predictions.jsonl")[0]["probabilities"] == {"0": 0.9, "1": 0.1}


def test_rows_are_numbered_as_the_data_set_does_whatever_order_they_come_in(tmp_path):
    order = [7, 2, 9, 0, 1, 8, 3, 4, 6, 5, 2]
    predict(lambda batch: batch[:, 0], tmp_path / "out.jsonl", loader=DataLoader(ROWS, batch_size=3, sampler=order))
    found = lines(tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == list(range(1, 11))
    assert [row["prediction"] for row in found] == list(range(10))


class Stream(IterableDataset):
    def __iter__(self):
        yield from ROWS


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_rows_of_streams_and_of_several_loaders_are_counted(tmp_path):
    predict(lambda batch: batch[:, 0], tmp_path / "out.jsonl", loader=DataLoader(Stream(), batch_size=4))
    assert [(row["row"], row["prediction"]) for row in lines(tmp_path / "out.jsonl")] == [(n + 1, n) for n in range(10)]
    loaders = [DataLoader(ROWS[:3], batch_size=2), DataLoader(ROWS[5:7], batch_size=2)]
    predict(lambda batch: batch[:, 0], tmp_path / "out.jsonl", loader=loaders)
    found = [(row["loader"], row["row"], row["prediction"]) for row in lines(tmp_path / "out.jsonl")]
    assert found == [(0, 1, 0), (0, 2, 1), (0, 3, 2), (1, 1, 5), (1, 2, 6)]


def test_an_interrupted_run_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "out.jsonl").write_text("old")

    def fail(batch):
        if batch[0, 0] > 3:
            raise ValueError("too large")
        return batch

    with pytest.raises(ValueError, match="too large"):
        predict(fail, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "old"
    predict(lambda batch: batch, tmp_path / "out.jsonl", fast_dev_run=True)
    assert (tmp_path / "out.jsonl").read_text() == "old"


@pytest.mark.filterwarnings("ignore:predict returned None")
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda batch: None, "returned None, which cannot be written"),
        (lambda batch: {"labels": ["a"], "scores": batch[:, 0]}, "returned 1 of 'labels', 4 of 'scores'"),
        (lambda batch: {"loss": batch.sum()}, "returned a Tensor as 'loss'"),
        (lambda batch: ["a"], "1 predictions for 4 rows"),
        (lambda batch: {"row": batch}, "a column 'row', which numbers rows; name it otherwise"),
    ],
    ids=["nothing", "lengths", "scalar", "rows", "number"],
)
def test_what_is_no_row_by_row_prediction_is_refused(tmp_path, answer, said):
    with pytest.raises((TypeError, ValueError), match=said):
        predict(answer, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["out.txt", "out", "s3://bucket/out.csv"])
def test_a_path_that_cannot_be_written_is_refused(path):
    with pytest.raises(ValueError, match=r"ends with \.jsonl or \.csv|is an address"):
        lp.PredictionWriter(path)


def test_values_are_those_that_json_has():
    columns = {"labels": [["a", "b"], []], "scores": torch.tensor([1.5, math.nan]), "extra": [{"x": torch.ones(1)}, {}]}
    rows = prediction_rows(columns, None, "Task")
    assert rows == [
        {"labels": ["a", "b"], "score": 1.5, "extra": {"x": [1.0]}},
        {"labels": [], "score": None, "extra": {}},
    ]
    assert flat_row(rows[0]) == {"labels": '["a", "b"]', "score": 1.5, "extra_x": [1.0]}
    assert prediction_rows({"probabilities": torch.tensor([0.25])}, ["a"], "Task") == [{"probability": 0.25}]
    assert prediction_rows(torch.zeros(1, 2).bfloat16(), None, "Task") == [{"prediction": [0.0, 0.0]}]


def test_lines_are_ordered_over_files(tmp_path):
    for name, numbers in {"a": [5, 1], "b": [0, 5, 3]}.items():
        writer = LinesWriter(tmp_path / name)
        for number in numbers:
            writer.write(number, f"{name}\t{number}")
        writer.close()
    found = list(ordered_lines([tmp_path / "a", tmp_path / "b"]))
    assert found == [(0, "b\t0"), (1, "a\t1"), (3, "b\t3"), (5, "a\t5")]


class Numbered(Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return ROWS[index]


def predict_together(folder):
    tuner = trainer(lp.PredictionWriter(f"{folder}/out.jsonl"), strategy="ddp", devices=2)
    tuner.predict(Task(classes, ["even", "odd"]), DataLoader(Numbered(), batch_size=2), return_predictions=False)
    repeating = torch.utils.data.DistributedSampler(Numbered(), shuffle=True)  # 8 rows for 7
    loader = DataLoader(Numbered(), batch_size=2, sampler=repeating)
    tuner = trainer(
        lp.PredictionWriter(f"{folder}/again.csv"), strategy="ddp", devices=2, use_distributed_sampler=False
    )
    tuner.predict(Task(classes, ["even", "odd"]), loader, return_predictions=False)
    return len(repeating)


@pytest.mark.slow
def test_several_processes_write_each_row_once_and_in_order(tmp_path):
    assert together(predict_together, str(tmp_path)) == [4, 4]
    assert [(row["row"], row["label"]) for row in lines(tmp_path / "out.jsonl")] == [
        (n + 1, "odd" if n % 2 else "even") for n in range(7)
    ]
    with (tmp_path / "again.csv").open(newline="") as file:
        assert [row["row"] for row in csv.DictReader(file)] == list("1234567")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "out.jsonl"]
