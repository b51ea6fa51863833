"""Each data module, grouped by length and streamed, resumes inside an epoch with the same rows and weights."""

import itertools
import logging
import warnings
from pathlib import Path

import pytest
import torch
from data_cases import DATA, prepare, save_rows
from processes import together
from resume_cases import Task, fit, outcome, saving

BATCH, ROWS, EVERY = 4, 72, 3


class TokenTask(Task):
    """Trains on numbers that follow from the tokens of each row, and notes them."""

    def training_step(self, batch, index):
        self.seen.append({name: value.tolist() for name, value in batch.items()})
        ids = batch["input_ids"].float() * batch["attention_mask"]
        x = torch.stack([ids.sum(1), ids.amax(1), (ids > 0).sum(1), ids[:, 0], ids[:, -1], ids.amin(1)], 1)
        return self.net(x / 50).square().mean()


def resume(folder, name, workers, **settings):
    """Return what differs between a run and its continuations, by where it stopped, and the whole run."""
    folder, place = Path(folder), Path(folder, f"{name} {workers}")
    settings = {"task": TokenTask, "epochs": 2, "limit_val_batches": 0, **settings}
    if "streamed" in name:
        settings["max_steps"] = 60
    make = lambda: DATA[name](folder, num_workers=workers)  # noqa: E731
    whole = fit(make, True, *saving(place, EVERY), **settings)
    files = {path.stem: path for path in place.glob("*.ckpt")}
    steps = torch.load(files["end-epoch=0"], weights_only=True)["global_step"]
    found = {}
    inside = steps - steps % EVERY + EVERY
    stops = {f"step={EVERY}": EVERY, "end-epoch=0": steps, f"step={inside}": inside}
    for stop, done in list(stops.items())[:: 2 if "devices" in settings else 1]:
        again = fit(make, True, path=files[stop], seed=99, **settings)
        found[name, workers, stop] = outcome(whole, again, done)
    return found, whole.seen[:steps]


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_each_data_module_resumes_inside_an_epoch(name, tmp_path):
    prepare(tmp_path)
    for workers in (0, 2):
        found, _ = resume(tmp_path, name, workers)
        assert len(found) == 3
        assert {place: what for place, what in found.items() if what != "equal"} == {}


def resume_two(folder):
    """Return the same in one of two processes, and the first epoch of each kind of data."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    differ, epochs = {}, {}
    for name, workers in (("text", 2), ("instructions, streamed", 0), ("mixed", 0)):
        found, epochs[name, workers] = resume(folder, name, workers, strategy="ddp", devices=2)
        differ |= {place: what for place, what in found.items() if what != "equal"}
    return differ, epochs


def contents(batches):
    """Return the rows of batches, as their tokens."""
    return [
        tuple(itertools.compress(ids, mask))
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.slow
def test_two_processes_resume_and_share_the_rows_of_an_epoch(tmp_path):
    prepare(tmp_path)
    save_rows(tmp_path / "train.jsonl", ROWS)
    data = DATA["text"](tmp_path)
    rows = sorted(tuple(row["input_ids"]) for row in data.examples("train"))
    results = together(resume_two, str(tmp_path))
    assert [differ for differ, _ in results] == [{}, {}]
    first, second = (epochs["text", 2] for _, epochs in results)
    assert sorted(contents(first) + contents(second)) == rows
    assert len(first) == len(second) == ROWS // BATCH // 2
    widths = [
        [len(batch["input_ids"][0]) for batch in (mine, other)] for mine, other in zip(first, second, strict=True)
    ]
    assert sum(abs(mine - other) for mine, other in widths) / len(widths) < 4  # of 3 to 32 tokens
    assert max(widths)[0] - min(widths)[0] > 15
    streamed = [epochs["instructions, streamed", 0] for _, epochs in results]
    assert len({*contents(streamed[0]), *contents(streamed[1])}) == ROWS
    assert [len(epoch) for epoch in streamed] == [ROWS // BATCH // 2] * 2
