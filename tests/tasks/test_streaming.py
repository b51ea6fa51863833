"""Train rows that are read and tokenised as they come."""

import itertools
import json

import pytest
import torch
from data_cases import DATA, prepare, save_rows

from lightning_peft.tasks.data.encoding import streaming
from lightning_peft.tasks.data.encoding.streaming import StreamedExamples
from lightning_peft.tasks.data.reading.table_stream import TableStream


@pytest.fixture
def folder(tmp_path):
    prepare(tmp_path)
    save_rows(tmp_path / "train.jsonl", 200)
    return tmp_path


def rows(batches):
    """Return the rows of batches as their tokens."""
    return [
        tuple(itertools.compress(ids.tolist(), mask.tolist()))
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_a_stream_has_the_rows_of_the_table_in_an_order_that_the_seed_decides(folder):
    expected = sorted(tuple(row["input_ids"]) for row in DATA["instructions"](folder).examples("train"))
    data = DATA["instructions, streamed"](folder)
    torch.manual_seed(1)
    passes = [rows(data.train_dataloader()) for _ in range(2)]
    torch.manual_seed(1)
    assert rows(data.train_dataloader()) == passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == expected
    assert rows(DATA["instructions, streamed"](folder, limit_train=9).train_dataloader()) != passes[0][:9]
    assert len(rows(DATA["instructions, streamed"](folder, limit_train=9).train_dataloader())) == 9


def test_no_more_than_a_buffer_is_read_before_the_first_batch(folder, monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER", 20)
    with (folder / "train.jsonl").open("a") as file:
        file.write("{no json\n")
    batches = iter(DATA["instructions, streamed"](folder).train_dataloader())
    assert len([next(batches) for _ in range(50)]) == 50
    with pytest.raises(ValueError, match=r"train.jsonl' is not valid JSON in line 201, column 2"):
        next(batches)


def test_errors_name_the_row_although_rows_are_shuffled(folder):
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    lines[77] = json.dumps({"instruction": "good", "output": 5}) + "\n"
    (folder / "train.jsonl").write_text("".join(lines))
    with pytest.raises(
        ValueError, match=r"'output' of .* something else than text in row 78 of '.*train.jsonl'\.|row 78"
    ):
        next(iter(DATA["instructions, streamed"](folder).train_dataloader()))


def shares(folder, count, encode):
    """Return the examples of each of some processes."""
    stream = TableStream(str(folder / "train.jsonl"))
    sentences = (lambda count, rows: f"{count} of {rows} left out", lambda count, rows: "cut")
    return [list(StreamedExamples(stream, encode, sentences, 1, rank, count)) for rank in range(count)]


def test_processes_share_the_rows_and_make_the_same_number_of_steps(folder):
    def whole(table):
        return [{"input_ids": [number]} for number in table.numbers]

    found = [[row["input_ids"][0] for row in share] for share in shares(folder, 3, whole)]
    assert [len(share) for share in found] == [67] * 3  # of 200 rows
    assert [sorted(set(share)) for share in found] == [list(range(1 + rank, 201, 3)) for rank in range(3)]

    def some(table):  # leaves out all but a few rows of the first share
        return [{"input_ids": [n]} for n in table.numbers if n % 3 != 1 or n < 30]

    with pytest.warns(UserWarning, match="57 of 67 left out"):
        found = [[row["input_ids"][0] for row in share] for share in shares(folder, 3, some)]
    assert [len(share) for share in found] == [67] * 3
    assert sorted(set(found[0])) == list(range(1, 30, 3))
    with pytest.raises(ValueError, match="67 of 67 left out"):
        shares(folder, 3, lambda table: [])
    with pytest.raises(ValueError, match="become several examples each, of which processes would have different"):
        shares(folder, 3, lambda table: whole(table) * 2)


class Steps:
    """Stands for a Trainer."""

    def __init__(self, max_steps, limit=1.0):
        self.max_steps, self.limit_train_batches = max_steps, limit
        self.global_rank, self.world_size = 0, 1


def test_what_cannot_be_streamed_is_refused_early(folder):
    with pytest.raises(ValueError, match="Got streaming=True, validation_fraction=0.05 and no validation file"):
        DATA["instructions, streamed"](folder, validation_fraction=0.05)
    data = DATA["instructions, streamed"](folder)
    data.trainer = Steps(-1)
    with pytest.raises(
        ValueError, match="no max_steps, but a schedule needs the number of steps.* Set trainer.max_steps"
    ):
        data.setup("fit")
    for trainer in (Steps(10), Steps(-1, 5)):
        data.trainer = trainer
        data.setup("fit")
    with pytest.raises(ValueError, match="Got streaming=True, but all train rows are asked for"):
        data.examples("train")
    (folder / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="train.jsonl' holds no rows"):
        data.setup("fit")
    data.splits.files["train"] = f"{folder}/no.jsonl"
    with pytest.raises(FileNotFoundError, match="no.jsonl' does not exist"):
        data.setup("fit")
